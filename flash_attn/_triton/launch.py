"""How kernels are launched: tile sizes, what fits a device, strides as kernels take them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from operator import itemgetter
from typing import Any, Callable, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import OutOfResources

from flash_attn._triton.numbers import IS_INTERPRETED, VERSION


class Config(NamedTuple):
    """Tile sizes of a kernel, and how the compiler spreads and pipelines a tile."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# Small tiles for the interpreter, so that small tests have many.
_INTERPRETED = (Config(64, 32, 4, 1),)
_INTERPRETED_DECODE = (Config(16, 32, 4, 1),)
# By kernel and padded head dim. "forward", "keys" and "queries" of 64 and 128 are the best of an
# H100 (docs/kernels/triton.md has the others); those of 256 were chosen by what the compiler says
# of registers, "decode" by what shared memory holds. A GPU that lacks memory for one takes the
# first smaller one that fits.
_CONFIGS: dict[tuple[str, int], Config] = {
    ("forward", 64): Config(64, 64, 4, 3),
    ("forward", 128): Config(128, 128, 8, 2),
    ("forward", 256): Config(128, 64, 8, 2),
    ("decode", 64): Config(16, 128, 4, 3),
    ("decode", 128): Config(16, 128, 4, 3),
    ("decode", 256): Config(16, 64, 4, 2),
    ("keys", 64): Config(64, 64, 4, 2),
    ("keys", 128): Config(64, 64, 4, 2),
    ("keys", 256): Config(32, 64, 8, 2),
    ("queries", 64): Config(64, 64, 4, 2),
    ("queries", 128): Config(64, 64, 4, 2),
    ("queries", 256): Config(64, 64, 8, 2),
}
_SMALLER = (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 32, 4, 1))
_SMALLER_DECODE = (Config(16, 64, 4, 2), Config(16, 32, 4, 1))


def configs(kind: str, d: int, dv: int) -> tuple[Config, ...]:
    """Tile sizes to try for a kernel: "forward", "decode" (the same for few rows), "keys" or
    "queries".
    """
    is_decode = kind == "decode"
    if IS_INTERPRETED:
        return _INTERPRETED_DECODE if is_decode else _INTERPRETED
    width = max(64, padded(d), padded(dv))
    return (_CONFIGS[kind, width], *(_SMALLER_DECODE if is_decode else _SMALLER))


def padded(d: int) -> int:
    """A row of d numbers as tiles have it: a power of two, 16 or more."""
    return max(16, 1 << (d - 1).bit_length())


_FITTING: dict[tuple[Any, ...], Config] = {}
# What has run once, by what its kernel was chosen and compiled for: the compiled kernel. Triton
# finds that anew at each launch, which takes it 3 to 10 times as long as the launch itself.
_COMPILED: dict[tuple[Any, ...], tuple[Config, Any]] = {}
_MOST_COMPILED = 4096
# Until Triton 3.3 a compiled kernel did not take the constants that it was compiled for.
_TAKES_CONSTANTS = VERSION >= (3, 3)


def launch(
    kernel: Any,
    tiles: tuple[Config, ...],
    size: str,
    length: int,
    others: int,
    device: torch.device,
    args: dict[str, Any],
) -> None:
    """Run `kernel` with the first of `tiles` that the device has registers and memory for.

    The grid is `num_blocks`, as many of the config's `size` ("rows" or "columns") as `length` has,
    times `others`.
    """
    if length * others == 0:
        return
    # Stricter than Triton's: all it asks of a pointer, and every number's value.
    key = (
        kernel, tiles, device,
        *[(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in args.values()],
    )  # fmt: skip
    known = _COMPILED.get(key)
    with _on(device):
        if known is not None:
            config, compiled = known
            grid, more = _grid(config, size, length, others)
            compiled[grid](*_in_order(kernel)({**args, **more}))
            return
        fitting = _FITTING.get((kernel, tiles, device))
        for config in (fitting,) if fitting else tiles:
            grid, more = _grid(config, size, length, others)
            try:
                compiled = kernel[grid](
                    **args,
                    **more,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
                )
            except OutOfResources:
                if config == tiles[-1]:
                    raise
            else:
                break
    _FITTING[kernel, tiles, device] = config
    if not IS_INTERPRETED:
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()
        _COMPILED[key] = config, compiled


def _grid(
    config: Config, size: str, length: int, others: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid, and what a kernel is told of it."""
    num_blocks = -(-length // getattr(config, size))
    told = {"num_blocks": num_blocks, "ROWS": config.rows, "COLUMNS": config.columns}
    return (num_blocks * others, 1, 1), told


@lru_cache
def _in_order(kernel: Any) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """What makes the arguments of a compiled kernel of those by name."""
    return itemgetter(*(p.name for p in kernel.params if _TAKES_CONSTANTS or not p.is_constexpr))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream."""
    return getattr(torch, device.type).device(device) if device.index is not None else nullcontext()


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Strides of x (b, s, h, d) under the names of a kernel; packed (total, h, d) is one batch."""
    *b, s, h, d = x.stride()
    return {f"{name}_b": b[0] if b else 0, f"{name}_s": s, f"{name}_h": h, f"{name}_d": d}


def row_strides(name: str, x: Tensor) -> dict[str, int]:
    """The same of a number for each row: (b, h, s), or packed (h, total)."""
    *b, h, _ = x.stride()
    return {f"{name}_b": b[0] if b else 0, f"{name}_h": h}


def lse_strides(name: str, x: Tensor) -> dict[str, int]:
    """The same of (b, s, h), or packed (total, h)."""
    *b, s, h = x.stride()
    return {f"{name}_b": b[0] if b else 0, f"{name}_h": h, f"{name}_s": s}


@lru_cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors, or whatever else runs a program at a time."""
    if IS_INTERPRETED:
        return 4
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["multiprocessor_count"])
