"""What every `flash_attn_with_kvcache` shares: defaults, the one op behind them, error names."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from flash_attn import _checks, _ops, _support


def with_kvcache(
    name: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
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
    alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of the public function `name`; arguments as its docstring has them."""
    if (k is None) != (v is None):
        given, missing = ("key", "value") if v is None else ("value", "key")
        _checks.fail(
            name, f"If {given} is supplied, {missing} must also be passed in", f"no {missing}"
        )
    if k is None and rotary_cos is not None:
        _checks.fail(
            name,
            "If rotary cos/sin are provided, new key / value to be appended to KV cache must also "
            "be provided",
            "k None",
        )
    if softmax_scale is None:
        head_dim = q.shape[-1] if qv is None else q.shape[-1] + qv.shape[-1]
        softmax_scale = head_dim**-0.5
    if isinstance(cache_seqlens, int):
        b = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_seqlens = torch.full((b,), cache_seqlens, dtype=torch.int32, device=q.device)
    try:
        result: tuple[Tensor, Tensor] = torch.ops.flash_attn._flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            qv,
            rotary_cos,
            rotary_sin,
            cache_seqlens,
            cache_batch_idx,
            cache_leftpad,
            block_table,
            cu_seqlens_q,
            cu_seqlens_k_new,
            max_seqlen_q,
            rotary_seqlens,
            q_descale,
            k_descale,
            v_descale,
            softmax_scale,
            causal,
            window_size[0],
            window_size[1],
            attention_chunk,
            softcap,
            rotary_interleaved,
            alibi_slopes,
            num_splits,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise _checks.renamed(error, _ops.WITH_KVCACHE, name) from error.__cause__
    return result


def check_fa2_cache(
    name: str,
    num_splits: int,
    cache_batch_idx: Optional[Tensor],
    cache_leftpad: Optional[Tensor],
    block_table: Optional[Tensor],
) -> None:
    """Rules of FlashAttention-2's cache that FlashAttention-3's does not have."""
    _checks.check_num_splits(name, num_splits, _support.MAX_SPLITS_FA2)
    if block_table is None:
        return
    if cache_batch_idx is not None:
        _checks.fail(
            name,
            "Paged KVcache does not support cache_batch_idx",
            "block_table and cache_batch_idx",
        )
    if cache_leftpad is not None:
        _checks.fail(
            name,
            "We don't support Paged KV and leftpad_k running at the same time yet",
            "block_table and cache_leftpad",
        )
