"""S_dmask, what tests look at: exp(score - maximum of the row), negative where dropout drops."""

from __future__ import annotations

import triton.language as tl

from flash_attn._triton.dropout import kept
from flash_attn._triton.numbers import LOG2_E, kernel, narrow, product, wide
from flash_attn._triton.scores import scored
from flash_attn._triton.sequences import block_bounds, cache_row, key_bounds, key_span, span
from flash_attn._triton.tiles import load_keys, load_rows, offsets


@kernel
def s_dmask_kernel(
    q, k, s_dmask,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, s_b, s_h, s_s,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, batch_idx, rows_of_cache,
    table, table_b, page_size, num_pages, room_q, room_k, hq, heads_per_key, num_blocks,
    left, right, chunk, scale, softcap, slopes, slopes_b, rng_state, threshold, tiny,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_LOCAL: tl.constexpr, IS_PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Two walks over the keys: for the maxima, then for the values. Entries that no row of a block
    sees are not written. No visible entry is below `tiny`, so that a dropped one keeps its sign.
    Grid: blocks of rows x hq x b, the first fastest.
    """
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    head, b = rest % hq, rest // hq
    start_q, sq = span(cu_seqlens_q, seqused_q, room_q, b)
    row = block * ROWS
    if row >= sq:
        return
    start_k, sk = key_span(cu_seqlens_k, seqused_k, leftpad_k, table, room_k, b)
    i = row + tl.arange(0, ROWS)
    first, last = key_bounds(i, sq, sk, left, right, chunk, IS_LOCAL)
    start, _from, _to, stop = block_bounds(first, last, COLUMNS)
    q += wide(b) * q_b + wide(head) * q_h + wide(start_q) * q_s
    queries = load_rows(q, row, offsets(q_s, q_d, ROWS, BLOCK_D), q_s, sq, ROWS, BLOCK_D, D, True)
    row_k = cache_row(batch_idx, b, rows_of_cache)
    k += wide(head // heads_per_key) * k_h
    if table is None:
        k += row_k * k_b + wide(start_k) * k_s
    else:
        table += row_k * table_b
    tile = offsets(k_s, k_d, COLUMNS, BLOCK_D)
    slope = None if slopes is None else tl.load(slopes + b * slopes_b + head)
    diagonal = i + sk - sq
    factor = scale * LOG2_E if IS_PLAIN else 1.0
    s_dmask += wide(b) * s_b + wide(head) * s_h + wide(i)[:, None] * s_s

    m = tl.full([ROWS], -float("inf"), tl.float32)
    for walk in tl.static_range(2):
        for n in range(start, stop, COLUMNS):
            j = n + tl.arange(0, COLUMNS)
            keys = load_keys(
                k, n, tile, k_b, k_s, k_d, start_k, sk, table, page_size, num_pages, room_k,
                COLUMNS, BLOCK_D, D, True,
            )  # fmt: skip
            s = product(queries, tl.trans(keys))
            distance = diagonal[:, None] - j[None, :]
            s, _ = scored(s, distance, slope, scale, softcap, IS_PLAIN, HAS_SOFTCAP)
            is_seen = (j[None, :] >= first[:, None]) & (j[None, :] <= last[:, None])
            s = tl.where(is_seen, s * factor, -float("inf"))
            if walk == 0:
                m = tl.maximum(m, tl.max(s, 1))
            else:
                shift = tl.where(m == -float("inf"), 0.0, m)
                p = tl.maximum(tl.exp2(s - shift[:, None]), tiny)
                is_kept = kept(rng_state, threshold, b * hq + head, row, n, ROWS, COLUMNS)
                p = tl.where(is_seen, tl.where(is_kept, p, -p), 0.0)
                is_row = (i < sq)[:, None] & (j < sk)[None, :]
                tl.store(s_dmask + j[None, :], narrow(p, s_dmask.dtype.element_ty), mask=is_row)
