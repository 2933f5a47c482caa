"""FLOP formulas of the operators, for `torch.utils.flop_counter`: each mirrors one operator.

They count matrix products as torch counts those of its own attention, without what a mask leaves
out, so that utilisation figures stay comparable. A forward pass is one product over the head dim of
q and k and one over that of v; a backward pass is three and two.
"""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor
from torch._subclasses import FakeTensor

_FORWARD_PASSES, _BACKWARD_PASSES = (1, 1), (3, 2)


def _forward_passes(qv: Optional[Tensor]) -> tuple[int, int]:
    """A second query against v is one more product over its head dim."""
    return _FORWARD_PASSES if qv is None else (1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, passes: tuple[int, int]) -> int:
    """FLOPs over every pair of rows of q (..., sq, hq, d) and k (..., sk, hk, d)."""
    pairs = q.shape[:-1].numel() * k.shape[-3]
    return 2 * pairs * (passes[0] * q.shape[-1] + passes[1] * v.shape[-1])


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    passes: tuple[int, int],
) -> int:
    """FLOPs over the pairs of each sequence, or over all pairs where the lengths can't be read."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense(q, k, v, passes)
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.is_meta:
        return _dense(q, k, v, passes)
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
    pairs = q.shape[-2] * sum(sq * sk for sq, sk in lengths)
    return int(2 * pairs * (passes[0] * q.shape[-1] + passes[1] * v.shape[-1]))


def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return _dense(q, k, v, _FORWARD_PASSES)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return _dense(q, k, v, _BACKWARD_PASSES)


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, _FORWARD_PASSES)


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
    cu_seqlens_k: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, _BACKWARD_PASSES)


def with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor],
    v: Optional[Tensor],
    qv: Optional[Tensor],
    rotary_cos: Optional[Tensor],
    rotary_sin: Optional[Tensor],
    cache_seqlens: Optional[Tensor],
    cache_batch_idx: Optional[Tensor],
    cache_leftpad: Optional[Tensor],
    block_table: Optional[Tensor],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Over the whole length of the cache: how much of it is in use stands on the device."""
    pages = 1 if block_table is None else block_table.shape[1]
    return pages * _dense(q, k_cache, v_cache, _forward_passes(qv))


def forward_fa3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Optional[Tensor] = None,
    v_new: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    out_: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, _forward_passes(qv))


def backward_fa3(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, _BACKWARD_PASSES)
