"""The backward kernels, from the forward pass's log-sum-exp (FlashAttention-2, arXiv:2307.08691).

    P = exp(S - L),  D = rowsum(dO * O),  dS = P * (dO V^T - D)
    dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K

`delta_kernel` makes D. `keys_kernel` holds a block of keys and walks over the queries that see it,
of every head that shares it, so dK and dV are sums in a fixed order. `queries_kernel` holds a block
of queries and walks over its keys: it makes S and dP a second time, and in exchange no sum crosses
programs. All gradients are therefore bitwise reproducible.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_attn._triton.dropout import kept
from flash_attn._triton.numbers import LOG2_E, dot, kernel, narrow, product, wide
from flash_attn._triton.scores import scored
from flash_attn._triton.sequences import block_bounds, key_bounds, query_bounds, span, stretch
from flash_attn._triton.tiles import load_rows, offsets, store_rows


@triton.jit
def _delta_start(start, b, IS_PACKED: tl.constexpr):
    """First row of a sequence in softmax_d, where packed ones start at multiples of 128."""
    if IS_PACKED:
        return (start + 128 * b) // 128 * 128
    else:
        return 0


@kernel
def delta_kernel(
    dout, out, delta,
    do_b, do_s, do_h, do_d, out_b, out_s, out_h, out_d, delta_b, delta_h,
    cu_seqlens_q, seqused_q, room_q, hq, num_blocks,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """softmax_d. Grid: blocks of rows x hq x b, the first fastest."""
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    head, b = rest % hq, rest // hq
    start, sq = span(cu_seqlens_q, seqused_q, room_q, b)
    row = block * ROWS
    if row >= sq:
        return
    dout += wide(b) * do_b + wide(head) * do_h + wide(start) * do_s
    out += wide(b) * out_b + wide(head) * out_h + wide(start) * out_s
    grads = load_rows(
        dout, row, offsets(do_s, do_d, ROWS, BLOCK_DV), do_s, sq, ROWS, BLOCK_DV, DV, True
    )
    outs = load_rows(
        out, row, offsets(out_s, out_d, ROWS, BLOCK_DV), out_s, sq, ROWS, BLOCK_DV, DV, True
    )
    total = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    i = row + tl.arange(0, ROWS)
    delta += (
        wide(b) * delta_b + wide(head) * delta_h + _delta_start(start, b, cu_seqlens_q is not None)
    )
    tl.store(delta + i, total, mask=i < sq)


@triton.jit
def _walk_queries(
    dk, dv, k, v, q, dout, lse, delta, i_from, i_to, q_tile, q_s, do_tile, do_s, sq,
    j, first, last, offset, slope, scale, softcap, rng_state, threshold, p_scale, stream, column,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv / p_scale after the queries from i_from to i_to; tiles of scores are
    transposed, (COLUMNS, ROWS), so that dS^T and P^T are left operands.
    """
    factor = scale * LOG2_E if IS_PLAIN else 1.0
    for row in range(i_from, i_to, ROWS):
        row = tl.multiple_of(row, ROWS)
        i = row + tl.arange(0, ROWS)
        queries = load_rows(q, row, q_tile, q_s, sq, ROWS, BLOCK_D, D, IS_MASKED)
        if IS_MASKED:
            row_lse = tl.load(lse + i, mask=i < sq, other=float("inf"))
            row_delta = tl.load(delta + i, mask=i < sq, other=0.0)
        else:
            row_lse, row_delta = tl.load(lse + i), tl.load(delta + i)
        s = product(k, tl.trans(queries))
        distance = (i + offset)[None, :] - j[:, None]
        s, cap = scored(s, distance, slope, scale, softcap, IS_PLAIN, HAS_SOFTCAP)
        p = tl.exp2(s * factor - (row_lse * LOG2_E)[None, :])
        if IS_MASKED:
            is_seen = (i[None, :] >= first[:, None]) & (i[None, :] <= last[:, None])
            p = tl.where(is_seen, p, 0.0)
        grads = load_rows(dout, row, do_tile, do_s, sq, ROWS, BLOCK_DV, DV, IS_MASKED)
        dp = product(v, tl.trans(grads))
        dropped = p
        if rng_state is not None:
            is_kept = tl.trans(kept(rng_state, threshold, stream, row, column, ROWS, COLUMNS))
            dropped = tl.where(is_kept, p, 0.0)
            dp = tl.where(is_kept, dp * p_scale, 0.0)
        dv = dot(narrow(dropped, grads.dtype), grads, dv)
        ds = p * (dp - row_delta[None, :])
        if HAS_SOFTCAP:
            ds *= 1.0 - cap * cap
        dk = dot(narrow(ds, queries.dtype), queries, dk)
    return dk, dv


@kernel
def keys_kernel(
    q, k, v, dout, lse, delta, dk, dv,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d, do_b, do_s, do_h, do_d,
    dk_b, dk_s, dk_h, dk_d, dv_b, dv_s, dv_h, dv_d, lse_b, lse_h, delta_b, delta_h,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, room_q, room_k,
    hq, heads_per_key, num_blocks,
    left, right, chunk, scale, softcap, slopes, slopes_b, rng_state, threshold, p_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_LOCAL: tl.constexpr, IS_PLAIN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid: blocks of keys x hk x b, the first fastest."""
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    hk = hq // heads_per_key
    head_k, b = rest % hk, rest // hk
    start_k, sk = span(cu_seqlens_k, seqused_k, room_k, b)
    column = block * COLUMNS
    if column >= sk:
        return
    start_q, sq = span(cu_seqlens_q, seqused_q, room_q, b)
    j = column + tl.arange(0, COLUMNS)
    first, last = query_bounds(j, sq, sk, left, right, chunk, IS_LOCAL)
    start, full_from, full_to, stop = block_bounds(first, last, ROWS)

    k += wide(b) * k_b + wide(head_k) * k_h + wide(start_k) * k_s
    v += wide(b) * v_b + wide(head_k) * v_h + wide(start_k) * v_s
    keys = load_rows(
        k, column, offsets(k_s, k_d, COLUMNS, BLOCK_D), k_s, sk, COLUMNS, BLOCK_D, D, True
    )
    values = load_rows(
        v, column, offsets(v_s, v_d, COLUMNS, BLOCK_DV), v_s, sk, COLUMNS, BLOCK_DV, DV, True
    )
    q_tile, do_tile = offsets(q_s, q_d, ROWS, BLOCK_D), offsets(do_s, do_d, ROWS, BLOCK_DV)
    q += wide(b) * q_b + wide(start_q) * q_s
    dout += wide(b) * do_b + wide(start_q) * do_s
    lse += wide(b) * lse_b + start_q
    delta += wide(b) * delta_b + _delta_start(start_q, b, cu_seqlens_q is not None)
    offset = sk - sq
    dk_sum = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([COLUMNS, BLOCK_DV], tl.float32)
    for head in range(head_k * heads_per_key, (head_k + 1) * heads_per_key):
        head_q, head_do = q + wide(head) * q_h, dout + wide(head) * do_h
        head_lse, head_delta = lse + wide(head) * lse_h, delta + wide(head) * delta_h
        slope = None if slopes is None else tl.load(slopes + b * slopes_b + head)
        stream = b * hq + head
        for part in tl.static_range(0 if IS_CAUSAL or IS_LOCAL else 1, 3):
            i_from, i_to = stretch(part, start, full_from, full_to, stop)
            dk_sum, dv_sum = _walk_queries(
                dk_sum, dv_sum, keys, values, head_q, head_do, head_lse, head_delta, i_from, i_to,
                q_tile, q_s, do_tile, do_s, sq, j, first, last, offset,
                slope, scale, softcap, rng_state, threshold, p_scale, stream, column,
                D, DV, BLOCK_D, BLOCK_DV, ROWS, COLUMNS, IS_PLAIN, HAS_SOFTCAP, part != 1,
            )  # fmt: skip
    dk += wide(b) * dk_b + wide(head_k) * dk_h + wide(start_k + column) * dk_s
    dv += wide(b) * dv_b + wide(head_k) * dv_h + wide(start_k + column) * dv_s
    store_rows(dk, dk_sum * scale, sk - column, dk_s, dk_d, COLUMNS, BLOCK_D, D)
    store_rows(dv, dv_sum * p_scale, sk - column, dv_s, dv_d, COLUMNS, BLOCK_DV, DV)


@triton.jit
def _walk_keys(
    dq, q, dout, row_lse, row_delta, k, v, j_from, j_to, k_tile, k_s, v_tile, v_s, sk,
    first, last, diagonal, slope, scale, softcap, rng_state, threshold, p_scale, stream, row,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale after the keys from j_from to j_to; row_lse in units of log 2."""
    factor = scale * LOG2_E if IS_PLAIN else 1.0
    for column in range(j_from, j_to, COLUMNS):
        column = tl.multiple_of(column, COLUMNS)
        j = column + tl.arange(0, COLUMNS)
        keys = load_rows(k, column, k_tile, k_s, sk, COLUMNS, BLOCK_D, D, IS_MASKED)
        values = load_rows(v, column, v_tile, v_s, sk, COLUMNS, BLOCK_DV, DV, IS_MASKED)
        s = product(q, tl.trans(keys))
        distance = diagonal[:, None] - j[None, :]
        s, cap = scored(s, distance, slope, scale, softcap, IS_PLAIN, HAS_SOFTCAP)
        p = tl.exp2(s * factor - row_lse[:, None])
        if IS_MASKED:
            is_seen = (j[None, :] >= first[:, None]) & (j[None, :] <= last[:, None])
            p = tl.where(is_seen, p, 0.0)
        dp = product(dout, tl.trans(values))
        if rng_state is not None:
            is_kept = kept(rng_state, threshold, stream, row, column, ROWS, COLUMNS)
            dp = tl.where(is_kept, dp * p_scale, 0.0)
        ds = p * (dp - row_delta[:, None])
        if HAS_SOFTCAP:
            ds *= 1.0 - cap * cap
        dq = dot(narrow(ds, keys.dtype), keys, dq)
    return dq


@kernel
def queries_kernel(
    q, k, v, dout, lse, delta, dq,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d, do_b, do_s, do_h, do_d,
    dq_b, dq_s, dq_h, dq_d, lse_b, lse_h, delta_b, delta_h,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, room_q, room_k,
    hq, heads_per_key, num_blocks,
    left, right, chunk, scale, softcap, slopes, slopes_b, rng_state, threshold, p_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_LOCAL: tl.constexpr, IS_PLAIN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dq. Grid: blocks of queries x hq x b, the first fastest."""
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    head, b = rest % hq, rest // hq
    if IS_CAUSAL:  # the longest first
        block = num_blocks - 1 - block
    start_q, sq = span(cu_seqlens_q, seqused_q, room_q, b)
    row = block * ROWS
    if row >= sq:
        return
    start_k, sk = span(cu_seqlens_k, seqused_k, room_k, b)
    i = row + tl.arange(0, ROWS)
    first, last = key_bounds(i, sq, sk, left, right, chunk, IS_LOCAL)
    start, full_from, full_to, stop = block_bounds(first, last, COLUMNS)

    q += wide(b) * q_b + wide(head) * q_h + wide(start_q) * q_s
    dout += wide(b) * do_b + wide(head) * do_h + wide(start_q) * do_s
    queries = load_rows(q, row, offsets(q_s, q_d, ROWS, BLOCK_D), q_s, sq, ROWS, BLOCK_D, D, True)
    grads = load_rows(
        dout, row, offsets(do_s, do_d, ROWS, BLOCK_DV), do_s, sq, ROWS, BLOCK_DV, DV, True
    )
    lse += wide(b) * lse_b + wide(head) * lse_h + start_q
    row_lse = tl.load(lse + i, mask=i < sq, other=float("inf")) * LOG2_E
    delta += (
        wide(b) * delta_b
        + wide(head) * delta_h
        + _delta_start(start_q, b, cu_seqlens_q is not None)
    )
    row_delta = tl.load(delta + i, mask=i < sq, other=0.0)
    head_k = head // heads_per_key
    k += wide(b) * k_b + wide(head_k) * k_h + wide(start_k) * k_s
    v += wide(b) * v_b + wide(head_k) * v_h + wide(start_k) * v_s
    k_tile, v_tile = offsets(k_s, k_d, COLUMNS, BLOCK_D), offsets(v_s, v_d, COLUMNS, BLOCK_DV)
    slope = None if slopes is None else tl.load(slopes + b * slopes_b + head)
    diagonal = i + sk - sq
    stream = b * hq + head
    dq_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for part in tl.static_range(0 if IS_LOCAL else 1, 3):
        j_from, j_to = stretch(part, start, full_from, full_to, stop)
        dq_sum = _walk_keys(
            dq_sum, queries, grads, row_lse, row_delta, k, v, j_from, j_to,
            k_tile, k_s, v_tile, v_s, sk, first, last, diagonal,
            slope, scale, softcap, rng_state, threshold, p_scale, stream, row,
            D, DV, BLOCK_D, BLOCK_DV, ROWS, COLUMNS, IS_PLAIN, HAS_SOFTCAP, part != 1,
        )  # fmt: skip
    dq += wide(b) * dq_b + wide(head) * dq_h + wide(start_q + row) * dq_s
    store_rows(dq, dq_sum * scale, sq - row, dq_s, dq_d, ROWS, BLOCK_D, D)
