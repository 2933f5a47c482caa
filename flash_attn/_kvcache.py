"""What every `flash_attn_with_kvcache` shares: defaults, the one op behind them, error names."""

from __future__ import annotations

import re
from typing import Optional, Union

import torch
from torch import Tensor

from flash_attn import _arguments, _ops, _support
from flash_attn.backends import cuda


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
    sm_margin: int = 0,
    table_name: Optional[str] = None,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of the public function `name`; arguments as its docstring has them.

    `table_name`: what that function calls `block_table`; None: it is an operator, whose arguments
    have the names of the rules.
    """
    check_new_keys(name, k, v, rotary_cos, rotary_sin, cu_seqlens_k_new, rotary_seqlens)
    softmax_scale = _arguments.scale(softmax_scale, q, qv)
    left, right = _arguments.window(name, window_size)
    seqlens = _seqlens_tensor(name, cache_seqlens, q, cu_seqlens_q)
    arguments = (
        q,
        k_cache,
        v_cache,
        k,
        v,
        qv,
        rotary_cos,
        rotary_sin,
        seqlens,
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
        left,
        right,
        attention_chunk,
        softcap,
        rotary_interleaved,
        alibi_slopes,
        num_splits,
        sm_margin,
    )
    operator = torch.ops.flash_attn._flash_attn_with_kvcache
    try:
        result: tuple[Tensor, Tensor]
        try:
            result = operator(*arguments)
        except RuntimeError:
            if not cuda.gives_way(q.device):
                raise
            result = operator(*arguments)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        found = _arguments.renamed(error, _ops.WITH_KVCACHE, name)
        if table_name is not None and str(found).startswith(f"{name}: "):
            found = type(found)(_in_callers_words(str(found), table_name))
        raise found from error.__cause__
    return result


def check_new_keys(
    name: str,
    k: Optional[Tensor],
    v: Optional[Tensor],
    rotary_cos: Optional[Tensor],
    rotary_sin: Optional[Tensor],
    cu_seqlens_k_new: Optional[Tensor],
    rotary_seqlens: Optional[Tensor],
) -> None:
    """What is about new keys goes with both, keys and values."""
    if (k is None) != (v is None):
        given, missing = ("key", "value") if v is None else ("value", "key")
        _arguments.fail(
            name, f"If {given} is supplied, {missing} must also be passed in", f"no {missing}"
        )
    if k is None and (rotary_cos is not None or rotary_sin is not None):
        _arguments.fail(
            name,
            "If rotary cos/sin are provided, new key / value to be appended to KV cache must also "
            "be provided",
            "k None",
        )
    if k is None and (cu_seqlens_k_new is not None or rotary_seqlens is not None):
        argument = "rotary_seqlens" if cu_seqlens_k_new is None else "cu_seqlens_k_new"
        _arguments.fail(
            name, f"{argument} is about new keys, so k and v must also be given", "k None"
        )


# Rules that speak of the caches when they say k and v.
_OF_CACHES = re.compile(
    r"\w+: ([kv] must have shape \(batch_size, seqlen, |v must have the shape of k |"
    r"\w+ and \w+ must|Number of heads|Paged KV cache)"
)


def _in_callers_words(message: str, table_name: str) -> str:
    """A rule's message with the names that the caller knows; published words stay."""
    if _OF_CACHES.match(message):
        return re.sub(r"\b([kv])\b", r"\1_cache", message)
    message = re.sub(r"(leftpad_k must .*; got )", r"\1cache_leftpad of ", message)
    for word, argument in (
        ("leftpad_k[", "cache_leftpad["),
        ("seqused_k", "cache_seqlens"),
        ("block_table", table_name),
    ):
        message = message.replace(word, argument)
    return message


def check_cache(name: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """The published assertions on the caches."""
    _arguments.check_tensors(name, q=q, k_cache=k_cache, v_cache=v_cache)
    for argument, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        is_strided = x.dim() > 0 and x.stride(-1) != 1
        assert not is_strided, f"{name}: {argument} must have contiguous last dimension"


def _seqlens_tensor(
    name: str,
    cache_seqlens: Optional[Union[int, Tensor]],
    q: Tensor,
    cu_seqlens_q: Optional[Tensor],
) -> Optional[Tensor]:
    """`cache_seqlens` as (b,) int32, or None."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, Tensor):
        if cache_seqlens.dtype != torch.int32:
            got = f"cache_seqlens of {cache_seqlens.dtype}"
            _arguments.fail(name, "seqlens_k must have dtype int32", got)
        return cache_seqlens
    _arguments.check_int(name, "cache_seqlens", cache_seqlens, "an int or a tensor")
    if abs(cache_seqlens) > torch.iinfo(torch.int32).max:
        _arguments.fail(name, "cache_seqlens must fit in 32 bits", f"{cache_seqlens}", ValueError)
    # What has no such dimension is refused later.
    b = q.shape[:1].numel() if cu_seqlens_q is None else max(cu_seqlens_q.numel() - 1, 0)
    return torch.full((b,), cache_seqlens, dtype=torch.int32, device=q.device)


def check_fa2_cache(
    name: str,
    num_splits: int,
    cache_batch_idx: Optional[Tensor],
    cache_leftpad: Optional[Tensor],
    block_table: Optional[Tensor],
) -> None:
    """Rules of FlashAttention-2's cache that FlashAttention-3's does not have."""
    _arguments.check_num_splits(name, num_splits, _support.MAX_SPLITS_FA2)
    if block_table is None:
        return
    if cache_batch_idx is not None:
        _arguments.fail(
            name,
            "Paged KVcache does not support cache_batch_idx",
            "block_table and cache_batch_idx",
        )
    if cache_leftpad is not None:
        _arguments.fail(
            name,
            "We don't support Paged KV and leftpad_k running at the same time yet",
            "block_table and cache_leftpad",
        )
