"""Device units from the truth table: one small file for each kernel.

A unit instantiates one template under an `extern "C"` name that says what it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from string import Template
from typing import Any

from build_tools.paths import support

# Short names in symbols and in the manifest, and the tags of csrc/device/ptx/math.cuh.
DTYPES = {
    "float16": ("fp16", "Half"),
    "bfloat16": ("bf16", "Bfloat16"),
    support.FP8_DTYPE: ("e4m3", "E4m3"),
}


@dataclass(frozen=True)
class Kind:
    """What a kernel computes: where its template stands and how it is called.

    Args:
        name: the manifest's word; csrc/host/registry.cpp has the same list.
        short: in symbols.
        headers: under `csrc/device`.
        call: the template's name with its arguments.
        threads: of a CTA.
        params: the parameter struct of csrc/host/flash.h.

    `{family}`, `{dtype}` and `{head_dim}` stand for a unit's own.
    """

    name: str
    short: str
    headers: tuple[str, ...]
    call: str
    threads: str
    params: str


def _of_config(config: str) -> str:
    return "flash::{family}::" + config + "<flash::ptx::{dtype}, {head_dim}>"


def _decode(rows: int) -> Kind:
    config = f"flash::decode::Config<flash::ptx::{{dtype}}, {{head_dim}}, {rows}>"
    return Kind(
        "decode",
        "fwd",
        ("decode/decode.cuh",),
        f"flash::decode::decode<{config}>",
        f"{config}::kThreads, {config}::kTile.ctas",
        "DecodeParams",
    )


_FORWARD, _BACKWARD = _of_config("ForwardConfig"), _of_config("BackwardConfig")

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "forward",
            "fwd",
            ("{family}/forward.cuh",),
            f"flash::{{family}}::forward<{_FORWARD}>",
            f"{_FORWARD}::kThreads",
            "ForwardParams",
        ),
        Kind(
            "combine",
            "combine",
            ("common/combine.cuh",),
            "flash::common::combine<flash::ptx::{dtype}>",
            "flash::common::kCombineThreads",
            "CombineParams",
        ),
        Kind(
            "append",
            "append",
            ("common/append.cuh",),
            "flash::common::append<flash::ptx::{dtype}>",
            "flash::common::kAppendThreads",
            "AppendParams",
        ),
        Kind(
            "delta",
            "delta",
            ("common/delta.cuh",),
            "flash::common::delta<flash::ptx::{dtype}>",
            "flash::common::kDeltaThreads",
            "BackwardParams",
        ),
        Kind(
            "backward",
            "bwd",
            ("{family}/backward.cuh",),
            f"flash::{{family}}::backward<{_BACKWARD}>",
            f"{_BACKWARD}::kThreads",
            "BackwardParams",
        ),
        Kind(
            "convert",
            "convert",
            ("common/convert_dq.cuh", "{family}/backward.cuh"),
            f"flash::common::convert_dq<{_BACKWARD}>",
            f"{_BACKWARD}::kThreads",
            "BackwardParams",
        ),
        Kind(
            "s_dmask",
            "s_dmask",
            ("common/s_dmask.cuh",),
            "flash::common::s_dmask<flash::ptx::{dtype}>",
            "flash::common::kSDmaskThreads",
            "ForwardParams",
        ),
        Kind(
            "fill",
            "fill",
            ("common/fill.cuh",),
            "flash::common::fill",
            "flash::common::kFillThreads",
            "FillParams",
        ),
        Kind(
            "dq",
            "dq",
            ("sm90/queries.cuh",),
            "flash::sm90::query_gradients<"
            "flash::sm90::QueriesConfig<flash::ptx::{dtype}, {head_dim}>>",
            "flash::sm90::queries_tile({head_dim}).threads(), 1",
            "TmaBackwardParams",
        ),
        _decode(rows=16),
    )
}


# Kinds that a family makes its own way. A CTA of Hopper's has an SM to itself, as the compiler must
# know for the registers that its warps hand over.
_CONVERT = "flash::sm90::ConvertConfig<flash::ptx::{dtype}, {head_dim}>"


def _hopper(kind: str, template: str, config: str, params: str) -> Kind:
    return dataclasses.replace(
        KINDS[kind],
        headers=(f"sm90/{template}.cuh",),
        call=f"flash::sm90::{template}<{config}>",
        threads=f"{config}::kThreads, 1",
        params=params,
    )


def _hopper_forward(serves: str) -> Kind:
    config = (
        f"flash::sm90::ForwardConfig<flash::ptx::{{dtype}}, {{head_dim}}, flash::sm90::{serves}>"
    )
    return _hopper("forward", "forward", config, "TmaForwardParams")


def _hopper_backward(config: str) -> Kind:
    return _hopper("backward", "backward", config, "TmaBackwardParams")


# Of V narrower than Q and K.
_NARROW = "<flash::ptx::{dtype}, {head_dim}, flash::sm90::kNarrowV>"
_LATENT = "flash::sm90::LatentConfig<flash::ptx::{dtype}, {head_dim}>"

KINDS_OF_FAMILIES = {
    ("sm90_wide", "forward"): _hopper_forward("kLong"),
    ("sm90_narrow", "forward"): _hopper_forward("kNarrow"),
    ("sm90", "forward"): _hopper_forward("kPlain"),
    ("sm90_scored", "forward"): _hopper_forward("kAll"),
    ("sm90_fp8_wide", "forward"): _hopper_forward("kLong"),
    ("sm90_fp8", "forward"): _hopper_forward("kPlain"),
    ("sm90_fp8_scored", "forward"): _hopper_forward("kAll"),
    ("sm90_latent", "forward"): _hopper("forward", "latent", _LATENT, "TmaLatentParams"),
    ("sm90_narrow", "backward"): _hopper_backward(f"flash::sm90::BackwardConfig{_NARROW}"),
    ("sm90_narrow", "dq"): dataclasses.replace(
        KINDS["dq"], call=f"flash::sm90::query_gradients<flash::sm90::QueriesConfig{_NARROW}>"
    ),
    ("sm90", "backward"): _hopper_backward(_BACKWARD),
    ("decode_wide", "decode"): _decode(rows=64),
    ("sm90", "convert"): dataclasses.replace(
        KINDS["convert"],
        call=f"flash::common::convert_dq<{_CONVERT}>",
        threads=f"{_CONVERT}::kThreads",
    ),
}

UNIT = Template("""\
$includes

extern "C" __global__ void __launch_bounds__($threads)
    $symbol(const __grid_constant__ flash::$params params) {
  $call(params);
}
""")


@dataclass(frozen=True)
class Unit:
    """One kernel to compile, for each of `archs`."""

    symbol: str
    kind: str
    family: str
    head_dim: int
    dtype: str
    archs: tuple[str, ...]
    source: str


def kind_in(family: str, kind: str) -> Kind:
    """A kind as a family makes it."""
    return KINDS_OF_FAMILIES.get((family, kind), KINDS[kind])


def units() -> list[Unit]:
    """Every kernel there is, in the order of the truth table."""
    return [
        _unit(family, kind_in(family.name, kind), head_dim, dtype)
        for family in support.KERNEL_FAMILIES
        for kind in family.kinds
        for head_dim in family.head_dims or (0,)
        for dtype in family.dtypes
    ]


def _unit(family: Any, kind: Kind, head_dim: int, dtype: str) -> Unit:
    short, tag = DTYPES[dtype]
    words = {"family": family.name, "dtype": tag, "head_dim": head_dim}
    where = f"_{family.name}_d{head_dim}" if head_dim else ""
    symbol = f"flash_{kind.short}{where}_{short}"
    source = UNIT.substitute(
        includes="\n".join(f'#include "device/{x.format(**words)}"' for x in kind.headers),
        threads=kind.threads.format(**words),
        symbol=symbol,
        params=kind.params,
        call=kind.call.format(**words),
    )
    return Unit(symbol, kind.name, family.name, head_dim, short, family.archs, source)
