"""The rotation of rotary position embeddings (RoFormer, arXiv:2104.09864) in plain torch.

A leaf module: it imports only torch, so the attention code (rotary on append to a KV cache) and
`flash_attn.layers.rotary` share one formula. Pair `m` of a head at position `p` turns by the angle
whose cosine and sine are `cos[p, m]` and `sin[p, m]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    conjugate: bool = False,
) -> Tensor:
    """Turn the first `rotary_dim` features of every head; return a new tensor of x's dtype.

    x: (..., s, h, d). cos, sin: (seqlen_ro, rotary_dim / 2). positions: int64, broadcastable to
    (..., s), every value in [0, seqlen_ro). `interleaved` pairs features (0, 1), (2, 3), ...
    (GPT-J); otherwise feature m is paired with m + rotary_dim / 2 (GPT-NeoX). `conjugate` turns the
    other way, which is both the inverse and the gradient. The maths is in float32 or wider.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    c = cos[positions].unsqueeze(-2).to(wide)
    s = sin[positions].unsqueeze(-2).to(wide)
    if conjugate:
        s = -s
    rotary_dim = 2 * cos.shape[-1]
    turning = x[..., :rotary_dim].to(wide)
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((first * c - second * s, first * s + second * c), dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        turned = torch.cat((first * c - second * s, first * s + second * c), dim=-1)
    turned = turned.to(x.dtype)
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def batch_positions(sq: int, offsets: int | Tensor, device: torch.device) -> Tensor:
    """Positions of a padded batch: (sq,) for an int offset, (b, sq) for offsets of shape (b,)."""
    steps = torch.arange(sq, device=device)
    if isinstance(offsets, Tensor):
        return offsets.to(device=device, dtype=torch.int64).unsqueeze(-1) + steps
    return steps + offsets


def varlen_positions(total: int, cu_seqlens: Tensor, offsets: int | Tensor = 0) -> Tensor:
    """Positions (total,) of packed sequences: 0, 1, 2, ... from each boundary, plus its offset.

    cu_seqlens: int (b + 1,). offsets: int, or (b,). Tokens in front of the first boundary or behind
    the last belong to no sequence; they get position 0, which every table has.
    """
    starts = cu_seqlens.to(torch.int64)
    tokens = torch.arange(total, device=cu_seqlens.device)
    owner = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
    owned = (owner < starts.numel() - 1) & (tokens >= starts[0])
    owner = torch.where(owned, owner, torch.zeros_like(owner))
    positions = tokens - starts[owner]
    if isinstance(offsets, Tensor):
        positions = positions + offsets.to(positions)[owner]
    else:
        positions = positions + offsets
    return torch.where(owned, positions, torch.zeros_like(positions))


def positions_of(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Positions of x (b, s, ...), or of packed (total, ...)."""
    if cu_seqlens is None:
        return batch_positions(x.shape[1], offsets, x.device)
    return varlen_positions(x.shape[0], cu_seqlens, offsets)


def check_rotary_dim(function: str, rotary_dim: int, d: int) -> None:
    if rotary_dim > d:
        raise ValueError(
            f"{function}: cos covers rotary_dim {rotary_dim}, the head dim is {d}; "
            "rotary_dim must be <= headdim"
        )


def check_tables(function: str, d: int, cos: Tensor, sin: Tensor) -> None:
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"{function}: cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            "both must be (seqlen_ro, rotary_dim / 2)"
        )
    check_rotary_dim(function, 2 * cos.shape[1], d)


def check_length(function: str, seqlen: int, offsets: int | Tensor, seqlen_ro: int) -> None:
    """Only what is known without reading a tensor."""
    last = seqlen if isinstance(offsets, Tensor) else seqlen + offsets
    if last > seqlen_ro:
        raise ValueError(
            f"{function}: sequence length {seqlen} with offset {offsets} needs {last} positions, "
            f"cos and sin hold {seqlen_ro}; seqlen_ro must be >= seqlen + offset"
        )
    if not isinstance(offsets, Tensor) and offsets < 0:
        raise ValueError(f"{function}: seqlen_offsets is {offsets}; it must be >= 0")


def check_offsets(function: str, offsets: int | Tensor, b: int) -> None:
    if not isinstance(offsets, Tensor):
        return
    if offsets.shape != (b,):
        raise ValueError(
            f"{function}: seqlen_offsets has shape {tuple(offsets.shape)}; it must be an int or "
            f"({b},), one per sequence"
        )
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{function}: seqlen_offsets has dtype {offsets.dtype}; it must be int32 or int64"
        )
