"""The forward kernel: online softmax over blocks of keys (FlashAttention-2, arXiv:2307.08691).

A program holds a block of queries of one head, or of the heads that share a key head (GROUP > 1:
row r is query r // GROUP of head r % GROUP), and walks over the keys that any of its queries sees.
Blocks that all of them see whole run without masks. A program of a split call takes its part of the
blocks and leaves a partial result for `combine`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_attn._triton.dropout import kept
from flash_attn._triton.numbers import LN_2, LOG2_E, dot, kernel, narrow, product, wide
from flash_attn._triton.scores import scored
from flash_attn._triton.sequences import (
    block_bounds,
    cache_row,
    key_bounds,
    key_span,
    span,
    stretch,
)
from flash_attn._triton.tiles import load_keys, offsets


@triton.jit
def _attend(
    acc, m, total, q, k, v, n_from, n_to,
    k_tile, v_tile, k_b, k_s, k_d, v_b, v_s, v_d, start_k, sk, table, page_size, num_pages, room_k,
    i, first, last, diagonal, slopes, scale, softcap, rng_state, threshold, stream, row,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """acc, m and total after the keys from n_from to n_to."""
    factor = scale * LOG2_E if IS_PLAIN else 1.0
    for n in range(n_from, n_to, COLUMNS):
        n = tl.multiple_of(n, COLUMNS)
        j = n + tl.arange(0, COLUMNS)
        keys = load_keys(
            k, n, k_tile, k_b, k_s, k_d, start_k, sk, table, page_size, num_pages, room_k,
            COLUMNS, BLOCK_D, D, IS_MASKED,
        )  # fmt: skip
        s = product(q, tl.trans(keys))
        distance = diagonal[:, None] - j[None, :]
        s, _ = scored(s, distance, slopes, scale, softcap, IS_PLAIN, HAS_SOFTCAP)
        if IS_MASKED:
            is_seen = (j[None, :] >= first[:, None]) & (j[None, :] <= last[:, None])
            s = tl.where(is_seen, s, -float("inf"))
        new_m = tl.maximum(m, tl.max(s, 1) * factor)
        shift = new_m
        if IS_MASKED:  # a row that has seen no key yet
            shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        p = tl.exp2(s * factor - shift[:, None])
        correction = tl.exp2(m - shift)
        total = total * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        if rng_state is not None:
            p = tl.where(kept(rng_state, threshold, stream, row, n, ROWS, COLUMNS), p, 0.0)
        values = load_keys(
            v, n, v_tile, v_b, v_s, v_d, start_k, sk, table, page_size, num_pages, room_k,
            COLUMNS, BLOCK_DV, DV, IS_MASKED,
        )  # fmt: skip
        acc = dot(narrow(p, values.dtype), values, acc)
        m = new_m
    return acc, m, total


@kernel
def forward_kernel(
    q, k, v, out, lse,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d,
    out_split, out_b, out_s, out_h, out_d, lse_split, lse_b, lse_h,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, batch_idx, rows_of_cache,
    table, table_b, page_size, num_pages, room_q, room_k,
    hq, heads_per_key, num_blocks, num_splits,
    left, right, chunk, scale, softcap, slopes, slopes_b, rng_state, threshold, p_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_LOCAL: tl.constexpr, IS_PLAIN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows x splits x (hq / GROUP) x b, the first fastest."""
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    split, rest = rest % num_splits, rest // num_splits
    head, b = rest % (hq // GROUP), rest // (hq // GROUP)
    if IS_CAUSAL:  # the longest first
        block = num_blocks - 1 - block
    start_q, sq = span(cu_seqlens_q, seqused_q, room_q, b)
    row = block * ROWS
    if row >= sq * GROUP:
        return
    start_k, sk = key_span(cu_seqlens_k, seqused_k, leftpad_k, table, room_k, b)
    r = row + tl.arange(0, ROWS)
    i, h = r // GROUP, head * GROUP + r % GROUP
    is_row = (r < sq * GROUP)[:, None]
    first, last = key_bounds(i, sq, sk, left, right, chunk, IS_LOCAL)
    start, full_from, full_to, stop = block_bounds(first, last, COLUMNS)
    # This split's part of the blocks.
    part = tl.cdiv(tl.cdiv(stop - start, COLUMNS), num_splits) * COLUMNS
    start = tl.minimum(start + split * part, stop)
    stop = tl.minimum(start + part, stop)
    full_from = tl.minimum(tl.maximum(full_from, start), stop)
    full_to = tl.minimum(tl.maximum(full_to, full_from), stop)

    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    batch, position = wide(b), wide(start_q + i)
    q_rows = q + batch * q_b + position * q_s + wide(h) * q_h
    queries = tl.load(q_rows[:, None] + dims * q_d, mask=is_row & (dims < D)[None, :], other=0.0)
    row_k, head_k = cache_row(batch_idx, b, rows_of_cache), wide(head * GROUP // heads_per_key)
    k += head_k * k_h
    v += head_k * v_h
    if table is None:
        k += row_k * k_b + wide(start_k) * k_s
        v += row_k * v_b + wide(start_k) * v_s
    else:
        table += row_k * table_b
    k_tile = offsets(k_s, k_d, COLUMNS, BLOCK_D)
    v_tile = offsets(v_s, v_d, COLUMNS, BLOCK_DV)
    if slopes is not None:
        slopes = tl.load(slopes + b * slopes_b + h)[:, None]
    diagonal = i + sk - sq
    stream = b * hq + head

    m = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for part in tl.static_range(0 if IS_LOCAL else 1, 3):
        n_from, n_to = stretch(part, start, full_from, full_to, stop)
        acc, m, total = _attend(
            acc, m, total, queries, k, v, n_from, n_to,
            k_tile, v_tile, k_b, k_s, k_d, v_b, v_s, v_d, start_k, sk,
            table, page_size, num_pages, room_k,
            i, first, last, diagonal, slopes, scale, softcap, rng_state, threshold, stream, row,
            D, DV, BLOCK_D, BLOCK_DV, ROWS, COLUMNS, IS_PLAIN, HAS_SOFTCAP, part != 1,
        )  # fmt: skip

    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    acc = acc * (p_scale / total)[:, None]
    row_lse = tl.where(is_empty, float("inf"), (m + tl.log2(total)) * LN_2)
    out_rows = out + wide(split) * out_split + batch * out_b + position * out_s + h * out_h
    is_out = is_row & (dims_v < DV)[None, :]
    tl.store(out_rows[:, None] + dims_v * out_d, narrow(acc, out.dtype.element_ty), mask=is_out)
    lse_rows = lse + wide(split) * lse_split + batch * lse_b + wide(h) * lse_h + position
    tl.store(lse_rows, row_lse, mask=r < sq * GROUP)
