"""Where a sequence's rows stand in memory, and which keys a query sees."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span(cu_seqlens, seqused, room, b):
    """First row and number of rows of sequence b; `room` is what one dense sequence or a packed
    tensor has. Values that point outside are clamped.
    """
    start, rows = 0, room
    if cu_seqlens is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), room)
        rows = tl.load(cu_seqlens + b + 1) - start
    if seqused is not None:
        rows = tl.load(seqused + b)
    return start, tl.maximum(tl.minimum(rows, room - start), 0)


@triton.jit
def key_span(cu_seqlens, seqused, leftpad, table, room, b):
    """The same for keys, which may be paged (`cu_seqlens` then only counts) and padded."""
    if table is not None:
        start, rows = 0, room
        if cu_seqlens is not None:
            rows = tl.load(cu_seqlens + b + 1) - tl.load(cu_seqlens + b)
        if seqused is not None:
            rows = tl.load(seqused + b)
        rows = tl.maximum(tl.minimum(rows, room), 0)
    else:
        start, rows = span(cu_seqlens, seqused, room, b)
    if leftpad is not None:
        skipped = tl.minimum(tl.maximum(tl.load(leftpad + b), 0), rows)
        start += skipped
        rows -= skipped
    return start, rows


@triton.jit
def cache_row(batch_idx, b, num_rows):
    """Row of the cache, or of the table of pages, that sequence b reads, as int64."""
    row = b
    if batch_idx is not None:
        row = tl.minimum(tl.maximum(tl.load(batch_idx + b), 0), num_rows - 1)
    return row.to(tl.int64)


@triton.jit
def pages_at(table, position, page_size, num_pages, capacity):
    """The page of each position, or -1 where it is none of the cache's."""
    is_there = (position >= 0) & (position < capacity)
    page = tl.load(table + position // page_size, mask=is_there, other=-1)
    return tl.where(page < num_pages, page, -1)


@triton.jit
def key_bounds(i, sq, sk, left, right, chunk, IS_LOCAL: tl.constexpr):
    """First and last key that each query i sees, none where the first is later; queries beyond the
    sequence are as its last.
    """
    diagonal = tl.minimum(i, sq - 1) + sk - sq
    last = tl.minimum(sk - 1, diagonal + right)
    first = tl.zeros_like(diagonal)
    if IS_LOCAL:
        first = tl.maximum(first, diagonal - left)
        if chunk > 0:
            chunk_start = tl.maximum(diagonal, 0) // chunk * chunk
            first = tl.maximum(first, chunk_start)
            last = tl.minimum(last, tl.where(diagonal < 0, -1, chunk_start + chunk - 1))
    return first, last


@triton.jit
def query_bounds(j, sq, sk, left, right, chunk, IS_LOCAL: tl.constexpr):
    """First and last query that sees each key j; keys beyond the sequence are as its last."""
    j = tl.minimum(j, sk - 1)
    facing = j - sk + sq
    first = tl.maximum(facing - right, 0)
    last = sq - 1 + tl.zeros_like(facing)
    if IS_LOCAL:
        last = tl.minimum(last, facing + left)
        if chunk > 0:
            chunk_start = j // chunk * chunk - sk + sq
            first = tl.maximum(first, chunk_start)
            last = tl.minimum(last, chunk_start + chunk - 1)
    return first, last


@triton.jit
def block_bounds(first, last, SIZE: tl.constexpr):
    """Blocks of a loop, from bounds (first, last) of each row: where it starts and stops, and from
    where to where no row needs a mask. All but the stop are multiples of SIZE.
    """
    start = tl.maximum(tl.min(first), 0) // SIZE * SIZE
    stop = tl.maximum(tl.max(last) + 1, start)
    full_from = tl.minimum((tl.max(first) + SIZE - 1) // SIZE * SIZE, stop)
    full_to = tl.maximum((tl.min(last) + 1) // SIZE * SIZE, full_from)
    return start, full_from, full_to, stop


@triton.jit
def stretch(part: tl.constexpr, start, full_from, full_to, stop):
    """From where to where part 0, 1 or 2 of a loop goes; part 1 needs no masks."""
    if part == 0:
        return start, full_from
    elif part == 1:
        return full_from, full_to
    else:
        return full_to, stop
