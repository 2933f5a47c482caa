"""Blocks of rows of q, k, v and their like, loaded from memory as tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_attn._triton.numbers import narrow, wide
from flash_attn._triton.sequences import pages_at


@triton.jit
def offsets(stride_s, stride_d, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Of the elements of a tile (SIZE, WIDTH), from its first."""
    rows, dims = tl.arange(0, SIZE), tl.arange(0, WIDTH)
    return wide(rows)[:, None] * stride_s + (dims * stride_d)[None, :]


@triton.jit
def load_rows(
    x, n, tile, stride_s, rows,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Rows n, n + 1, ... of x, whose offsets from the first are `tile`; 0 beyond DIM, and beyond
    `rows` if masked.
    """
    pointers = x + wide(n) * stride_s + tile
    is_there = (n + tl.arange(0, SIZE) < rows)[:, None]
    is_dim = (tl.arange(0, WIDTH) < DIM)[None, :]
    if IS_MASKED:
        return tl.load(pointers, mask=is_there & is_dim, other=0.0)
    elif WIDTH != DIM:
        return tl.load(pointers, mask=is_dim, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_paged_rows(
    x, n, stride_page, stride_s, stride_d, start, rows, table, page_size, num_pages, room,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The same of a sequence whose row 0 stands at position `start` of the pages in `table`; a page
    that the cache does not have is 0.
    """
    offset, dims = n + tl.arange(0, SIZE), tl.arange(0, WIDTH)
    position = start + offset
    page = pages_at(table, position, page_size, num_pages, room)
    in_memory = wide(page) * stride_page + wide(position % page_size) * stride_s
    is_there = (page >= 0) & (offset < rows)
    pointers = x + in_memory[:, None] + (dims * stride_d)[None, :]
    return tl.load(pointers, mask=is_there[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def load_keys(
    x, n, tile, stride_b, stride_s, stride_d, start, rows, table, page_size, num_pages, room,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Rows n, n + 1, ... of a sequence, in pages or not."""
    if table is None:
        return load_rows(x, n, tile, stride_s, rows, SIZE, WIDTH, DIM, IS_MASKED)
    else:
        return load_paged_rows(
            x, n, stride_b, stride_s, stride_d, start, rows, table, page_size, num_pages, room,
            SIZE, WIDTH, DIM,
        )  # fmt: skip


@triton.jit
def store_rows(
    x, value, rows, stride_s, stride_d,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The first `rows` rows of a tile (SIZE, WIDTH) at x."""
    is_there = (tl.arange(0, SIZE) < rows)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    pointers = x + offsets(stride_s, stride_d, SIZE, WIDTH)
    tl.store(pointers, narrow(value, x.dtype.element_ty), mask=is_there)
