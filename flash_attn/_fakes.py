"""Shapes and dtypes of the operators' results, for tracing: each rule mirrors one operator."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from flash_attn._problem import lse_dtype, out_dtype, round_up, softmax_d_shape


def out_and_lse(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of out and softmax_lse; q is (b, sq, hq, d), or (total_q, hq, d) if packed."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype(q.dtype))
    is_packed = q.dim() == 3
    shape = (q.shape[1], q.shape[0]) if is_packed else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(shape, dtype=lse_dtype(q.dtype))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], round_up(q.shape[1]), round_up(k.shape[1]))
    s_dmask = q.new_empty(shape if return_softmax else (0,))
    return (*out_and_lse(q, v), s_dmask, q.new_empty(2, dtype=torch.int64))


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    return_softmax: bool = False,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = cu_seqlens_q.shape[0] - 1
    shape = (b, q.shape[1], round_up(max_seqlen_q), round_up(max_seqlen_k))
    s_dmask = q.new_empty(shape if return_softmax else (0,))
    return (*out_and_lse(q, v), s_dmask, q.new_empty(2, dtype=torch.int64))


def softmax_d(q: Tensor, cu_seqlens_q: Optional[Tensor]) -> Tensor:
    b = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return q.new_empty(softmax_d_shape(q, b), dtype=lse_dtype(q.dtype))


def backward(dout: Tensor, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return softmax_d(q, None)


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    cu_seqlens_q: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return softmax_d(q, cu_seqlens_q)


def with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return out_and_lse(q, v_cache)


def no_partials(q: Tensor) -> tuple[Tensor, Tensor]:
    """out_accum and softmax_lse_accum of a FlashAttention-3 call that was not split."""
    return q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)


def forward_fa3(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*out_and_lse(q, v), *no_partials(q))


def backward_fa3(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Optional[Tensor] = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return softmax_d(q, cu_seqlens_q)


def combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: Optional[torch.dtype] = None
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if out_dtype is None else out_dtype
    out = out_partial.new_empty(out_partial.shape[1:], dtype=dtype)
    return out, lse_partial.new_empty(lse_partial.shape[1:])


def get_scheduler_metadata(*args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(args[8])
