"""The reference every backend is compared with: attention written as its definition.

Everything materialises the full score matrix and shares no code with `flash_attn`. With the default
`dtype=torch.float64` a result is the truth; with a lower dtype the same formula runs in that
precision through PyTorch (matrix products take and give `dtype`, elementwise steps are float32) and
is the yardstick of the tolerance rule in `compare.py`. All of it is differentiable by autograd, and
the gradient of a row that sees no key is zero.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

Window = tuple[int, int]


def visible_keys(
    sq: int, sk: int, *, causal: bool = False, window: Window = (-1, -1), attention_chunk: int = 0
) -> Tensor:
    """Boolean (sq, sk): which keys each query sees; the last query stands on the last key."""
    row = torch.arange(sq)[:, None] + sk - sq
    col = torch.arange(sk)[None, :]
    left, right = window
    visible = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        visible &= col <= row
    if left >= 0:
        visible &= col >= row - left
    if right >= 0:
        visible &= col <= row + right
    if attention_chunk > 0:
        visible &= row.div(attention_chunk, rounding_mode="floor") == col.div(
            attention_chunk, rounding_mode="floor"
        )
    return visible


def alibi_bias(slopes: Tensor, sq: int, sk: int) -> Tensor:
    """Bias (b or 1, hq, sq, sk) for slopes (hq,) or (b, hq): minus slope times distance."""
    distance = (torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)[None, :]).abs()
    slopes = slopes if slopes.dim() == 2 else slopes[None]
    return -slopes[:, :, None, None] * distance


def _per_query_head(x: Tensor, hq: int) -> Tensor:
    """Repeat the heads of x (b, s, hk, d) so that query head i meets key head i // (hq / hk)."""
    group = hq // x.shape[2]
    return x.unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3)


def _descaled(x: Tensor, descale: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """x (b, s, h, d) in dtype, times its descale (b, hk), repeated when x has query heads."""
    x = x.to(dtype)
    if descale is None:
        return x
    factor = _per_query_head(descale[:, None, :, None].to(dtype), x.shape[2])
    return x * factor


def masked_scores(
    q: Tensor,
    k: Tensor,
    *,
    softmax_scale: float,
    visible: Tensor,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    extra: Optional[tuple[Tensor, Tensor]] = None,
) -> Tensor:
    """Scores (b, hq, sq, sk), -inf where a query does not see a key.

    `extra` is a second (query, key) pair whose products are added before scaling (`qv` with V).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(wide)
    if extra is not None:
        scores = scores + torch.einsum("bihd,bjhd->bhij", *extra).to(wide)
    scores = scores * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes.to(wide), *scores.shape[2:])
    return scores.masked_fill(~visible, -math.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    attention_chunk: int = 0,
    qv: Optional[Tensor] = None,
    dropout_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    dtype: torch.dtype = torch.float64,
    p_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """q (b, sq, hq, d), k (b, sk, hk, d), v (b, sk, hk, dv) -> out, lse.

    out is (b, sq, hq, dv) and lse (b, hq, sq), natural log. `dropout_mask`
    (b, hq, sq, sk) is true where a probability is kept; `qv` is (b, sq, hq, dv). With `p_dtype`
    probabilities are rounded to it before they meet v, the largest of a row as 256.
    """
    hq, sq, sk = q.shape[2], q.shape[1], k.shape[1]
    q = _descaled(q, q_descale, dtype)
    k = _per_query_head(_descaled(k, k_descale, dtype), hq)
    v = _per_query_head(_descaled(v, v_descale, dtype), hq)
    extra = None if qv is None else (qv.to(dtype), v)
    if softmax_scale is None:
        softmax_scale = (q.shape[3] + (0 if qv is None else v.shape[3])) ** -0.5
    scores = masked_scores(
        q,
        k,
        softmax_scale=softmax_scale,
        visible=visible_keys(sq, sk, causal=causal, window=window, attention_chunk=attention_chunk),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        extra=extra,
    )
    row_max = (
        scores.detach().amax(-1, keepdim=True) if sk else scores.new_zeros(*scores.shape[:3], 1)
    )
    row_max = torch.where(row_max.isfinite(), row_max, 0.0)
    weights = torch.exp(scores - row_max)
    total = weights.sum(-1, keepdim=True)
    sees_a_key = total > 0
    total = torch.where(sees_a_key, total, 1.0)
    lse = torch.where(sees_a_key, row_max + torch.log(total), math.inf).squeeze(-1)
    if p_dtype is not None:
        weights = (256 * weights).to(p_dtype).to(weights.dtype) / 256
    probabilities = weights / total
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask / (1 - dropout_p)
    out = torch.einsum("bhij,bjhd->bihd", probabilities.to(dtype), v)
    return out, lse


def _row(x: Optional[Tensor], i: int) -> Optional[Tensor]:
    """Sequence i of a per-batch tensor, keeping the batch dimension."""
    return None if x is None else x[i : i + 1]


def _slopes_of(alibi_slopes: Optional[Tensor], i: int) -> Optional[Tensor]:
    if alibi_slopes is None or alibi_slopes.dim() == 1:
        return alibi_slopes
    return alibi_slopes[i]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    alibi_slopes: Optional[Tensor] = None,
    dropout_mask: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """q (total_q, hq, d), k, v (total_k, hk, d | dv) -> out (total_q, hq, dv), lse (hq, total_q).

    Sequence i uses its first `seqused_q[i]` queries and its keys `leftpad_k[i]` to `seqused_k[i]`.
    Rows outside every used range hold 0 and lse +inf. `dropout_mask` is (b, hq, max_sq, max_sk).
    """
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=dtype)
    lse = torch.full((q.shape[1], q.shape[0]), math.inf, dtype=wide)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        len_q = starts_q[i + 1] - starts_q[i] if seqused_q is None else int(seqused_q[i])
        len_k = starts_k[i + 1] - starts_k[i] if seqused_k is None else int(seqused_k[i])
        left = 0 if leftpad_k is None else int(leftpad_k[i])
        rows = slice(starts_q[i], starts_q[i] + len_q)
        keys = slice(starts_k[i] + left, starts_k[i] + max(left, len_k))
        mask = _row(dropout_mask, i)
        out_i, lse_i = attention(
            q[rows][None],
            k[keys][None],
            v[keys][None],
            qv=None if qv is None else qv[rows][None],
            alibi_slopes=_slopes_of(alibi_slopes, i),
            dropout_mask=None if mask is None else mask[:, :, :len_q, : keys.stop - keys.start],
            q_descale=_row(q_descale, i),
            k_descale=_row(k_descale, i),
            v_descale=_row(v_descale, i),
            dtype=dtype,
            **options,
        )
        out[rows] = out_i[0]
        lse[:, rows] = lse_i[0]
    return out, lse


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding of x (s, h, d) at `positions` (s,); cos, sin (seqlen_ro, rotary_dim / 2).

    Pairs are neighbours (2i, 2i + 1) when interleaved, else (i, i + rotary_dim / 2).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions][:, None, :].to(wide) for table in (cos, sin))
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    pairs = rotated.unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1 if interleaved else -2)
    return torch.cat((pairs.flatten(-2).to(x.dtype), rest), dim=-1)


def _sequences(x: Optional[Tensor], cu_seqlens: Optional[Tensor], batch: int) -> list[Any]:
    """x split into one (s, h, d) tensor per sequence; Nones when x is None."""
    if x is None:
        return [None] * batch
    if cu_seqlens is None:
        return list(x)
    starts = cu_seqlens.tolist()
    return [x[starts[i] : starts[i + 1]] for i in range(batch)]


def _slots(
    i: int, begin: int, end: int, page: int, batch_idx: Optional[Tensor], table: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Where positions begin..end of sequence i live in the cache: (first index, row) tensors."""
    positions = torch.arange(begin, end)
    source = i if batch_idx is None else int(batch_idx[i])
    if table is None:
        return torch.full_like(positions, source), positions
    return table[source][positions // page].long(), positions % page


def kvcache_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    *,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    rotary_interleaved: bool = True,
    rotary_seqlens: Optional[Tensor] = None,
    cache_seqlens: Optional[Tensor] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    alibi_slopes: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    causal: bool = False,
    window: Window = (-1, -1),
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One decoding step: append k, v to the caches, then attend. -> out, lse, k_cache, v_cache.

    Caches are (b_cache, s, hk, d), or (num_blocks, page, hk, d) with `block_table`; those given are
    left alone and the appended ones returned in `dtype`. `cache_seqlens` is (b,) (None: caches are
    full). q is (b, sq, hq, d) -> lse (b, hq, sq), or (total_q, hq, d) -> lse (hq, total_q).
    """
    batch = q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    k_cache, v_cache = k_cache.to(dtype, copy=True), v_cache.to(dtype, copy=True)
    every_row_moves = causal or max(window) >= 0 or options.get("attention_chunk", 0) > 0
    queries = _sequences(q, cu_seqlens_q, batch)
    queries_v = _sequences(qv, cu_seqlens_q, batch)
    new_keys = _sequences(k, cu_seqlens_k_new, batch)
    new_values = _sequences(v, cu_seqlens_k_new, batch)
    outs, lses = [], []
    for i in range(batch):
        used = capacity if cache_seqlens is None else int(cache_seqlens[i])
        left = 0 if cache_leftpad is None else int(cache_leftpad[i])
        q_i, k_i, v_i = queries[i].to(dtype), new_keys[i], new_values[i]
        if rotary_cos is not None:
            start = used if rotary_seqlens is None else int(rotary_seqlens[i])
            steps = torch.arange(len(q_i)) if every_row_moves else torch.zeros(len(q_i)).long()
            table = (rotary_cos, rotary_sin)
            q_i = rotate(q_i, *table, start + steps, interleaved=rotary_interleaved)
            k_positions = start + torch.arange(len(k_i))
            k_i = rotate(k_i.to(dtype), *table, k_positions, interleaved=rotary_interleaved)
        if k_i is not None:
            slots = _slots(i, used, used + len(k_i), page, cache_batch_idx, block_table)
            k_cache[slots], v_cache[slots] = k_i.to(dtype), v_i.to(dtype)
            used += len(k_i)
        slots = _slots(i, left, max(left, used), page, cache_batch_idx, block_table)
        out_i, lse_i = attention(
            q_i[None],
            k_cache[slots][None],
            v_cache[slots][None],
            qv=None if qv is None else queries_v[i][None],
            alibi_slopes=_slopes_of(alibi_slopes, i),
            q_descale=_row(q_descale, i),
            k_descale=_row(k_descale, i),
            v_descale=_row(v_descale, i),
            causal=causal,
            window=window,
            dtype=dtype,
            **options,
        )
        outs.append(out_i[0])
        lses.append(lse_i[0])
    if cu_seqlens_q is None:
        return torch.stack(outs), torch.stack(lses), k_cache, v_cache
    return torch.cat(outs), torch.cat(lses, dim=1), k_cache, v_cache


def combine(
    out_partial: Tensor, lse_partial: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys: out (n, ..., d), lse (n, ...) -> (..., d), (...).

    A part that saw no key has an infinite lse; where no part saw one, out is 0 and lse +inf.
    """
    lse_partial = lse_partial.to(dtype)
    lse_partial = torch.where(lse_partial == math.inf, -math.inf, lse_partial)
    lse = torch.logsumexp(lse_partial, dim=0)
    nothing_seen = lse == -math.inf
    weights = torch.exp(lse_partial - torch.where(nothing_seen, 0.0, lse))
    out = (weights[..., None] * out_partial.to(dtype)).sum(0)
    return out, torch.where(nothing_seen, math.inf, lse)
