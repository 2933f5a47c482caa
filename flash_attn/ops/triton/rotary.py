"""Rotary position embeddings (RoFormer, arXiv:2104.09864), without autograd.

`flash_attn.layers.rotary` has the differentiable functions.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

from flash_attn._rotary import check_call, positions_of, rotate
from flash_attn.backends import triton


def __getattr__(name: str) -> Any:
    if name != "rotary_kernel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    triton.require("flash_attn.ops.triton.rotary.rotary_kernel")
    from flash_attn._triton.rotary import rotary_kernel

    return rotary_kernel


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
