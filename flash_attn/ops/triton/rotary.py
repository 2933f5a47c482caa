"""Rotary position embeddings (RoFormer, arXiv:2104.09864), without autograd.

`flash_attn.layers.rotary` has the differentiable functions.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

from flash_attn._attention import is_watched
from flash_attn._cpu import tables
from flash_attn._rotary import check_length, check_offsets, check_tables, positions_of, rotate
from flash_attn.backends import triton


def __getattr__(name: str) -> Any:
    if name != "rotary_kernel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    triton.require("flash_attn.ops.triton.rotary.rotary_kernel")
    from flash_attn._triton.rotary import rotary_kernel

    return rotary_kernel


def _are_readable(*positions: Union[int, Tensor]) -> bool:
    """Whether values can be read without waiting for a device, and without a tracer to see it."""
    tensors = tuple(x for x in positions if isinstance(x, Tensor))
    return all(x.device.type == "cpu" for x in tensors) and not is_watched(tensors)


def _check_offsets_hold(function: str, offsets: Tensor, lengths: list[int], seqlen_ro: int) -> None:
    room = [seqlen_ro - length for length in lengths]
    why = f"the {seqlen_ro} positions of cos and sin, less the length of the sequence"
    tables.check_each(function, "seqlen_offsets", offsets.tolist(), room, why)


def check_padded(
    function: str, x: Tensor, cos: Tensor, sin: Tensor, offsets: Union[int, Tensor]
) -> None:
    """Rules for x (b, s, ..., d)."""
    b, s = x.shape[:2]
    check_tables(function, x.shape[-1], cos, sin)
    check_offsets(function, offsets, b)
    check_length(function, s, offsets, cos.shape[0])
    if isinstance(offsets, Tensor) and _are_readable(offsets):
        _check_offsets_hold(function, offsets, [s] * b, cos.shape[0])


def check_call(
    function: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Union[int, Tensor],
    cu_seqlens: Optional[Tensor],
    max_seqlen: Optional[int],
) -> None:
    """Rules for x (b, s, h, d), or for packed (total, h, d)."""
    if cu_seqlens is None:
        if x.dim() != 4:
            raise ValueError(f"{function}: x has shape {tuple(x.shape)}; it must be (b, s, h, d)")
        check_padded(function, x, cos, sin, offsets)
        return
    if max_seqlen is None:
        raise ValueError(
            f"{function}: max_seqlen is None; "
            "if cu_seqlens is passed in, then max_seqlen must be passed"
        )
    if x.dim() != 3:
        raise ValueError(
            f"{function}: x has shape {tuple(x.shape)}; with cu_seqlens it must be (total, h, d)"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{function}: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; it "
            "must be int32 or int64 of shape (b + 1,)"
        )
    check_tables(function, x.shape[-1], cos, sin)
    check_offsets(function, offsets, cu_seqlens.shape[0] - 1)
    check_length(function, max_seqlen, offsets, cos.shape[0])
    if not _are_readable(cu_seqlens, offsets):
        return
    bounds = tables.offsets(function, "cu_seqlens", cu_seqlens, x.shape[0])
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:])]
    tables.check_longest(function, "max_seqlen", lengths, max_seqlen)
    if isinstance(offsets, Tensor):
        _check_offsets_hold(function, offsets, lengths, cos.shape[0])


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Union[int, Tensor] = 0,
    cu_seqlens: Optional[Tensor] = None,
    max_seqlen: Optional[int] = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate the first `rotary_dim <= d` features of every head by the token's position.

    Arguments as in `flash_attn.layers.rotary.apply_rotary_emb`. conjugate: turn the other way, the
    inverse. On a GPU a position behind the tables, which only a tensor of offsets can cause, is
    turned as the last one.
    """
    check_call("apply_rotary", x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if not triton.serves(x):
        positions = positions_of(x, seqlen_offsets, cu_seqlens)
        turned = rotate(x, cos, sin, positions, interleaved, conjugate)
        return x.copy_(turned) if inplace else turned
    from flash_attn._triton.rotary import rotate_into

    out = x
    if not inplace:
        is_whole = 2 * cos.shape[1] == x.shape[-1] and cu_seqlens is None
        out = torch.empty_like(x) if is_whole else x.clone()
    rotate_into(
        out,
        x,
        cos,
        sin,
        seqlen_offsets,
        cu_seqlens,
        max_seqlen,
        interleaved=interleaved,
        conjugate=conjugate,
    )
    return out
