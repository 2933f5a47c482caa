"""FlashAttention-3's names: the same attention, with its argument order and its extras.

Shapes: q (b, sq, hq, d), k (b, sk, hk, d), v (b, sk, hk, dv), out (b, sq, hq, dv); packed sequences
have (total, h, d) with `cu_seqlens` (b + 1,) int32. dv may differ from d (d <= 256; dv <= 256, or
dv <= 512 where d <= 64; on a GPU dv > 256 needs compute capability 9.0 and has no backward). fp16,
bf16, on the CPU float32 and float64 too, and float8_e4m3fn (forward only, out is bf16). `causal`,
`window_size` and `softcap` as in `flash_attn.flash_attn_interface`.

Arguments beyond FlashAttention-2's:
    qv: (b, sq, hq, dv), a second query against v: scores are scale * (q k^T + qv v^T). On a GPU it
        needs compute capability 9.0 and d <= 64. No backward.
    q_descale, k_descale, v_descale: (b, hk) float32, what FP8 inputs are multiplied by.
    attention_chunk: c > 0 cuts positions into chunks of c; a query sees keys of its own chunk only.
        No backward.
    seqused_q, seqused_k: (b,) int32, rows in use of each sequence, from its first.
    num_splits: parts that the keys are cut into for parallel work; 0 chooses.
    pack_gqa: a hint for GPU kernels; results don't depend on it.
    sm_margin: multiprocessors left to other kernels where CTAs share the work: on Hopper, forward
        and backward, and in calls of few queries over a cache, unless `num_splits` cuts those.
    softmax_scale: None is d ** -0.5, or (d + dv) ** -0.5 with `qv`.

softmax_lse is (b, hq, sq), or (hq, total_q) for packed sequences, the natural logarithm; a query
that sees no key has out 0 and softmax_lse +inf. Errors as in `flash_attn.flash_attn_interface`.

Source: FlashAttention-3 (arXiv:2407.08608).
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

from flash_attn import _arguments, _fakes, _ops_fa3, _ops_splits, _support
from flash_attn._attention_fa3 import attend
from flash_attn._kvcache import check_cache, with_kvcache
from flash_attn.flash_attn_interface import maybe_contiguous, round_multiple

flash_attn_3_cuda = flash_attn_3_gpu = torch.ops.flash_attn_3

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "round_multiple",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    qv: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Optional[bool] = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (b, sq, hq, d) over k (b, sk, hk, d) and v (b, sk, hk, dv).

    Returns out (b, sq, hq, dv), or (out, softmax_lse) with `return_attn_probs`.
    """
    name = "flash_attn_func"
    _arguments.check_tensors(name, q=q, k=k, v=v)
    lengths = (None, None, None, None, None, None)
    options = (
        *lengths,
        qv,
        q_descale,
        k_descale,
        v_descale,
        _arguments.scale(softmax_scale, q, qv),
        causal,
        *_arguments.window(name, window_size),
        attention_chunk,
        softcap,
        num_splits,
        pack_gqa,
        deterministic,
        sm_margin,
    )
    _arguments.check_num_splits(name, num_splits, _support.MAX_SPLITS_FA3)
    result = attend(name, (q, k, v), options)
    return result if return_attn_probs else result[0]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    qv: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: Optional[bool] = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of packed sequences: q (total_q, hq, d), k (total_k, hk, d), v (total_k, hk, dv).

    Rows of a sequence behind `seqused_q` have out 0, softmax_lse +inf and gradient 0; keys behind
    `seqused_k` are ignored and have gradient 0.

    Returns out (total_q, hq, dv), or (out, softmax_lse) with `return_attn_probs`.
    """
    name = "flash_attn_varlen_func"
    _arguments.check_tensors(
        name, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k)
    options = (
        *lengths,
        qv,
        q_descale,
        k_descale,
        v_descale,
        _arguments.scale(softmax_scale, q, qv),
        causal,
        *_arguments.window(name, window_size),
        attention_chunk,
        softcap,
        num_splits,
        pack_gqa,
        deterministic,
        sm_margin,
    )
    _arguments.check_num_splits(name, num_splits, _support.MAX_SPLITS_FA3)
    result = attend(name, (q, k, v), options)
    return result if return_attn_probs else result[0]


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: Optional[int] = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (b, s, 3, h, d), or (b, s, hq + 2 hk, d) with `num_heads_q` = hq.

    No copy is made, and qkv's gradient is written in one piece.
    """
    name = "flash_attn_qkvpacked_func"
    _check_qkv(name, qkv, num_heads_q)
    options = (
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        q_descale,
        k_descale,
        v_descale,
        _arguments.scale(softmax_scale, qkv),
        causal,
        *_arguments.window(name, window_size),
        attention_chunk,
        softcap,
        1,
        None,
        deterministic,
        sm_margin,
    )
    result = attend(name, (qkv,), options, num_heads_q)
    return result if return_attn_probs else result[0]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    page_table: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    rotary_seqlens: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Optional[Tensor] = None,
    num_splits: int = 0,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over a cache, which may grow first; inference only.

    As `flash_attn.flash_attn_with_kvcache`, and beyond it: `page_table` (b, max_pages) goes with
    `cache_batch_idx` and `cache_leftpad`; q may be packed, (total_q, hq, d) with `cu_seqlens_q` and
    `max_seqlen_q`; new keys may be packed, (total_new, hk, d) with `cu_seqlens_k_new`;
    `rotary_seqlens` (b,) int32 is the rotary position of the first new key in place of
    `cache_seqlens`; under `attention_chunk` each query has a position of its own, as under a mask.
    The cache may be FP8 (e4m3) under queries of any dtype, with `k_descale` and `v_descale`, and
    `q_descale` for FP8 queries; new keys then have its dtype and are not rotated. On a GPU queries
    times heads of a group are at most 64 over such a cache, but for FP8 queries over one without
    pages.

    Returns out, or (out, softmax_lse, out_accum, softmax_lse_accum) with `return_softmax_lse`; the
    accumulators of split calls are empty where the call was not split.
    """
    name = "flash_attn_with_kvcache"
    check_cache(name, q, k_cache, v_cache)
    _arguments.check_optional_tensors(
        name, qv=qv, cu_seqlens_q=cu_seqlens_q, scheduler_metadata=scheduler_metadata
    )
    _arguments.check_num_splits(name, num_splits, _support.MAX_SPLITS_FA3)
    _arguments.check_sm_margin(name, sm_margin)
    _ops_splits.check_metadata(name, scheduler_metadata, q)
    out, softmax_lse = with_kvcache(
        name,
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        qv=qv,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
        rotary_seqlens=rotary_seqlens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        sm_margin=sm_margin,
        table_name="page_table",
    )
    if not return_softmax_lse:
        return out
    return (out, softmax_lse, *_fakes.no_partials(q))


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention over parts of the keys: weights are exp(lse_partial - softmax_lse).

    Args:
        out_partial: (num_splits, b, s, h, d) float32.
        lse_partial: (num_splits, b, s, h) float32; a part without keys has lse -inf or +inf.
        out: (b, s, h, d), written in place if given.
        out_dtype: dtype of the result otherwise; None is float32.

    Returns:
        out (b, s, h, d) and softmax_lse (b, s, h) float32.
    """
    name = "flash_attn_combine"
    _arguments.check_tensors(name, out_partial=out_partial, lse_partial=lse_partial)
    _arguments.check_optional_tensors(name, out=out)
    _arguments.check_optional_float_dtype(name, out_dtype=out_dtype)
    try:
        result: tuple[Tensor, Tensor] = (
            flash_attn_3_gpu._flash_attn_combine(out_partial, lse_partial, out_dtype)
            if out is None
            else _ops_splits.fwd_combine(out_partial, lse_partial, out)
        )
    except RuntimeError as error:
        raise _arguments.renamed(error, _ops_splits.COMBINE, name) from error.__cause__
    return result


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: Optional[int] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    page_size: Optional[int] = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
) -> Tensor:
    """The plan of a `flash_attn_with_kvcache` call, computed once for all layers of a step.

    Returns (b,) int32, the number of parts that the keys of each sequence are cut into: what
    `num_splits` asks for, else one. Pass it on as `scheduler_metadata`.
    """
    name = "get_scheduler_metadata"
    try:
        result: Tensor = _ops_splits.get_scheduler_metadata(
            batch_size,
            max_seqlen_q,
            max_seqlen_k,
            num_heads_q,
            num_heads_kv,
            headdim,
            headdim if headdim_v is None else headdim_v,
            qkv_dtype,
            cache_seqlens,
            cu_seqlens_q,
            None,
            cu_seqlens_k_new,
            None,
            cache_leftpad,
            page_size,
            max_seqlen_k_new,
            causal,
            *_arguments.window(name, window_size),
            attention_chunk,
            has_softcap,
            num_splits,
            pack_gqa,
            sm_margin,
        )
    except RuntimeError as error:
        raise _arguments.renamed(error, _ops_splits.METADATA, name) from None
    return result


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Optional[Tensor] = None,
    v_new: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    out_: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    page_table: Optional[Tensor] = None,
    kv_batch_idx: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    seqlens_rotary: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Optional[Tensor] = None,
    num_splits: int = 1,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, softmax_lse, out_accum, softmax_lse_accum; no autograd.

    With `k_new`, k and v are a cache that grows in place; `out_` is written in place. Those two are
    for eager use; without them this is the operator that compilers trace.
    """
    is_traced = k_new is None and out_ is None
    op = flash_attn_3_gpu._flash_attn_forward if is_traced else _ops_fa3.fwd
    result: tuple[Tensor, Tensor, Tensor, Tensor] = op(
        q,
        k,
        v,
        k_new,
        v_new,
        qv,
        out_,
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_k_new,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        page_table,
        kv_batch_idx,
        leftpad_k,
        rotary_cos,
        rotary_sin,
        seqlens_rotary,
        q_descale,
        k_descale,
        v_descale,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        attention_chunk,
        softcap,
        rotary_interleaved,
        scheduler_metadata,
        num_splits,
        pack_gqa,
        sm_margin,
    )
    return result


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    sequed_q: Optional[Tensor] = None,
    sequed_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    dq: Optional[Tensor] = None,
    dk: Optional[Tensor] = None,
    dv: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """dq, dk and dv are written in place; softmax_d = rowsum(dout * out) is returned."""
    softmax_d: Tensor = flash_attn_3_gpu._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        sequed_q,
        sequed_k,
        max_seqlen_q,
        max_seqlen_k,
        dq,
        dk,
        dv,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        deterministic,
        sm_margin,
    )
    return softmax_d


def _check_qkv(name: str, qkv: Tensor, num_heads_q: Optional[int]) -> None:
    _arguments.check_tensors(name, qkv=qkv)
    if num_heads_q is None:
        _arguments.check_packed(name, "qkv", qkv, 3, 5)
        return
    _arguments.check_int(name, "num_heads_q", num_heads_q, "an int or None")
    num_heads_kv = qkv.shape[-2] - num_heads_q if qkv.dim() == 4 else -1
    if num_heads_q < 1 or num_heads_kv < 2 or num_heads_kv % 2 != 0:
        _arguments.fail(
            name,
            "qkv must have shape (batch_size, seqlen, num_heads_q + 2 * num_heads_k, head_size)",
            f"shape {tuple(qkv.shape)}, num_heads_q {num_heads_q}",
        )
