"""What a row of `problems.py` is: its fields, its readable id, and the tensors it stands for.

A row makes its tensors from a generator seeded by its id, on the CPU and then moved, so each device
sees the same numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FP8 = torch.float8_e4m3fn
DTYPES = (FP64, FP32, BF16, FP16)
DTYPE_NAMES = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16", FP8: "e4m3"}

Lengths = tuple[int, ...]

HUGE_STRIDE = 2**31 + 64


def nan_filled(x: Tensor, *shape: int) -> Tensor:
    """Memory around x that no result may depend on: NaN."""
    return torch.full(shape, math.nan, dtype=x.dtype, device=x.device)


def place(x: Tensor, layout: str) -> Tensor:
    """A tensor equal to x whose strides or offset are those of `layout`."""
    if layout == "plain":
        return x
    if layout == "headsfirst":
        return x.transpose(1, -2).contiguous().transpose(1, -2)
    if layout == "lastdim":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        wide = nan_filled(x, *x.shape[:-1], x.shape[-1] + 8)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if layout == "misaligned":
        flat = nan_filled(x, x.numel() + 3)
        flat[3:] = x.flatten()
        return flat[3:].view(x.shape)
    if layout == "seqfirst":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "huge":
        stride = (HUGE_STRIDE, *x.stride()[1:])
        size = HUGE_STRIDE * (x.shape[0] - 1) + x[0].numel()
        view = torch.empty(size, dtype=x.dtype, device=x.device).as_strided(x.shape, stride)
        return view.copy_(x)
    raise ValueError(f"unknown layout {layout!r}")


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def cumulative(lengths: Lengths, device: str) -> Tensor:
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(starts, dtype=torch.int32, device=device)


def int32(values: Optional[Lengths], device: str) -> Optional[Tensor]:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def slopes(kind: str, b: int, hq: int, generator: torch.Generator, device: str) -> Optional[Tensor]:
    if not kind:
        return None
    shape = (hq,) if kind == "h" else (b, hq)
    return (torch.rand(shape, generator=generator) * 0.3).to(device)


def descales(b: int, hk: int, generator: torch.Generator, device: str) -> dict[str, Tensor]:
    return {
        name: (torch.rand(b, hk, generator=generator) + 0.5).to(device)
        for name in ("q_descale", "k_descale", "v_descale")
    }


@dataclass(frozen=True)
class Tensors:
    """What a row runs on. `leaves` are the differentiable inputs in the packing of the row."""

    leaves: tuple[Tensor, ...]
    dout: Tensor
    alibi_slopes: Optional[Tensor]
    cu_seqlens_q: Optional[Tensor]
    cu_seqlens_k: Optional[Tensor]
    seqused_q: Optional[Tensor]
    seqused_k: Optional[Tensor]
    qv: Optional[Tensor]
    descales: dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One dense or varlen case; `lens_q` makes it varlen (then b, sq and sk follow from it)."""

    b: int = 2
    sq: int = 64
    sk: int = 64
    hq: int = 2
    hk: int = 2
    d: int = 32
    dv: Optional[int] = None
    dtype: torch.dtype = FP32
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""
    dropout_p: float = 0.0
    softmax_scale: Optional[float] = None
    attention_chunk: int = 0
    qv: bool = False
    descale: bool = False
    packing: str = "separate"
    layout: str = "plain"
    lens_q: Optional[Lengths] = None
    lens_k: Optional[Lengths] = None
    used_q: Optional[Lengths] = None
    used_k: Optional[Lengths] = None
    deterministic: bool = False

    @property
    def value_dim(self) -> int:
        return self.d if self.dv is None else self.dv

    @property
    def is_varlen(self) -> bool:
        return self.lens_q is not None

    @property
    def low_dtype(self) -> torch.dtype:
        """The precision of the yardstick run and of the result."""
        return BF16 if self.dtype == FP8 else self.dtype

    def __str__(self) -> str:
        if self.is_varlen:
            sizes = [f"q{'.'.join(map(str, self.lens_q))}", f"k{'.'.join(map(str, self.lens_k))}"]
        else:
            sizes = [f"b{self.b}", f"sq{self.sq}", f"sk{self.sk}"]
        used = [
            f"{name}{'.'.join(map(str, values))}"
            for name, values in (("usedq", self.used_q), ("usedk", self.used_k))
            if values is not None
        ]
        flags = [
            "causal" if self.causal else "",
            "window{}.{}".format(*self.window) if self.window != (-1, -1) else "",
            f"cap{self.softcap:g}" if self.softcap else "",
            f"alibi_{self.alibi}" if self.alibi else "",
            f"drop{self.dropout_p:g}" if self.dropout_p else "",
            f"scale{self.softmax_scale:g}" if self.softmax_scale is not None else "",
            f"chunk{self.attention_chunk}" if self.attention_chunk else "",
            "qv" if self.qv else "",
            "descale" if self.descale else "",
            self.packing if self.packing != "separate" else "",
            self.layout if self.layout != "plain" else "",
            "deterministic" if self.deterministic else "",
        ]
        dim = f"d{self.d}" + (f"v{self.dv}" if self.dv is not None else "")
        heads = f"h{self.hq}" + (f"k{self.hk}" if self.hk != self.hq else "")
        parts = [*sizes, *used, heads, dim, DTYPE_NAMES[self.dtype], *flags]
        return "-".join(part for part in parts if part)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Leading dimensions of q and of k."""
        if self.lens_q is None or self.lens_k is None:
            return (self.b, self.sq), (self.b, self.sk)
        return (sum(self.lens_q),), (sum(self.lens_k),)

    def pack(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if self.packing == "separate":
            return q, k, v
        if self.packing == "kv":
            return q, torch.stack((k, v), dim=-3)
        if self.packing == "qkv":
            return (torch.stack((q, k, v), dim=-3),)
        if self.packing == "qkvheads":
            return (torch.cat((q, k, v), dim=-2),)
        raise ValueError(f"unknown packing {self.packing!r}")

    def split(self, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The q, k, v that packed leaves hold, as views."""
        if self.packing == "separate":
            q, k, v = leaves
            return q, k, v
        if self.packing == "kv":
            return (leaves[0], *leaves[1].unbind(-3))
        if self.packing == "qkv":
            return leaves[0].unbind(-3)
        return leaves[0].split((self.hq, self.hk, self.hk), dim=-2)

    def tensors(self, device: str = "cpu") -> Tensors:
        """Make the row's tensors on `device`; equal on every device."""
        generator = seeded(str(self))
        lead_q, lead_k = self._shapes()
        q = normal((*lead_q, self.hq, self.d), generator) * max(1.0, self.softcap / 2)
        k = normal((*lead_k, self.hk, self.d), generator)
        v = normal((*lead_k, self.hk, self.value_dim), generator)
        dout = normal((*lead_q, self.hq, self.value_dim), generator)
        qv = normal((*lead_q, self.hq, self.value_dim), generator) if self.qv else None
        packed = [x.to(device, self.dtype) for x in self.pack(q, k, v)]
        # The huge layout is put on the last leaf alone: one such allocation is enough.
        plain = len(packed) - 1 if self.layout == "huge" else 0
        leaves = [place(x, "plain" if i < plain else self.layout) for i, x in enumerate(packed)]
        layout_dout = "plain" if self.layout == "huge" else self.layout
        return Tensors(
            leaves=tuple(leaves),
            dout=place(dout.to(device, self.low_dtype), layout_dout),
            alibi_slopes=slopes(self.alibi, self.b, self.hq, generator, device),
            cu_seqlens_q=None if self.lens_q is None else cumulative(self.lens_q, device),
            cu_seqlens_k=None if self.lens_k is None else cumulative(self.lens_k, device),
            seqused_q=int32(self.used_q, device),
            seqused_k=int32(self.used_k, device),
            qv=None if qv is None else place(qv.to(device, self.dtype), self.layout),
            descales=descales(self.b, self.hk, generator, device) if self.descale else {},
        )


def varlen(lens_q: Lengths, lens_k: Optional[Lengths] = None, **options: Any) -> Problem:
    """A varlen row: one length per sequence; keys default to as many as queries."""
    lens_k = lens_q if lens_k is None else lens_k
    if len(lens_q) != len(lens_k):
        raise ValueError(f"{len(lens_q)} query lengths, {len(lens_k)} key lengths")
    return Problem(
        b=len(lens_q),
        sq=max(lens_q),
        sk=max(lens_k),
        lens_q=lens_q,
        lens_k=lens_k,
        **options,
    )
