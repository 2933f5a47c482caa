"""Merges attention over parts of the keys, as split calls leave it."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_attn._triton.numbers import LN_2, LOG2_E, kernel, narrow, wide
from flash_attn._triton.sequences import span


@triton.jit
def _part_lse(lses, split, lses_split, is_row):
    """Of each row, in units of log 2; -inf where the part has no keys, which +inf says too."""
    lse = tl.load(lses + wide(split) * lses_split, mask=is_row, other=-float("inf"))
    return tl.where(lse == float("inf"), -float("inf"), lse * LOG2_E)


@kernel
def combine_kernel(
    out, lse, outs, lses,
    out_b, out_s, out_h, out_d, lse_b, lse_h, lse_s,
    outs_split, outs_b, outs_s, outs_h, outs_d, lses_split, lses_b, lses_h, lses_s,
    cu_seqlens_q, seqused_q, room_q, hq, num_splits, num_blocks,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out and lse of outs and lses. Grid: blocks of rows x hq x b, the first fastest."""
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    head, b = wide(rest % hq), rest // hq
    start, sq = span(cu_seqlens_q, seqused_q, room_q, b)
    row = block * ROWS
    if row >= sq:
        return
    b = wide(b)
    i = row + tl.arange(0, ROWS)
    is_row = i < sq
    position = wide(start + i)
    lses += b * lses_b + head * lses_h + position * lses_s
    m = tl.full([ROWS], -float("inf"), tl.float32)
    for split in range(num_splits):
        m = tl.maximum(m, _part_lse(lses, split, lses_split, is_row))
    shift = tl.where(m == -float("inf"), 0.0, m)

    dims = tl.arange(0, BLOCK_DV)
    is_dim = (dims < DV)[None, :]
    outs_rows = outs + b * outs_b + head * outs_h + position * outs_s
    pointers = outs_rows[:, None] + (dims * outs_d)[None, :]
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for split in range(num_splits):
        weight = tl.exp2(_part_lse(lses, split, lses_split, is_row) - shift)
        # What a part without keys left is not read.
        is_there = (is_row & (weight > 0.0))[:, None] & is_dim
        part = tl.load(pointers + wide(split) * outs_split, mask=is_there, other=0.0)
        acc += part.to(tl.float32) * weight[:, None]
        total += weight
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    out_rows = out + b * out_b + head * out_h + position * out_s
    acc = narrow(acc / total[:, None], out.dtype.element_ty)
    tl.store(out_rows[:, None] + (dims * out_d)[None, :], acc, mask=is_row[:, None] & is_dim)
    row_lse = tl.where(is_empty, float("inf"), (shift + tl.log2(total)) * LN_2)
    tl.store(lse + b * lse_b + head * lse_h + position * lse_s, row_lse, mask=is_row)
