"""What the tables of a call hold: lengths, offsets and indices, each checked to stay in its range.

A message has the function, the table, the place in it, what stands there, and the range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from flash_attn._problem import Sequences


def check(name: str, what: str, value: int, low: int, high: int, why: str) -> None:
    """ValueError unless `value` lies between `low` and `high`; `why` says what `high` is."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {what} is {value}; it must lie between {low} and {high}, {why}")


def check_each(
    name: str, argument: str, values: Sequence[int], highs: Sequence[int], why: str, low: int = 0
) -> None:
    """The same of each entry of a table (b,)."""
    for i, (value, high) in enumerate(zip(values, highs)):
        check(name, f"{argument}[{i}]", value, low, high, why)


def batch_size(q: Tensor, seqs: Sequences) -> int:
    """Number of sequences."""
    return q.shape[0] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.numel() - 1


def ints(x: Optional[Tensor], b: int) -> list[int]:
    """The entries of a table (b,); zeros where there is none."""
    return [0] * b if x is None else [int(value) for value in x.tolist()]


def offsets(name: str, argument: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """`cu_seqlens` as ints; ValueError unless it never falls and stays in [0, total]."""
    bounds = [int(value) for value in cu_seqlens.tolist()]
    for i, bound in enumerate(bounds):
        low = bounds[i - 1] if i else 0
        why = "the rows there are, and not below the one in front"
        check(name, f"{argument}[{i}]", bound, min(low, total), total, why)
    return bounds


def _starts(
    name: str, argument: str, cu_seqlens: Tensor, total: int
) -> tuple[list[int], list[int]]:
    """First row and room of each sequence where lengths are given apart (`seqused`).

    `cu_seqlens` then only marks where sequences start, in any order (xformers' masks over blocks
    of keys). A sequence has room up to the next mark, or to the end if that lies before.
    """
    bounds = [int(value) for value in cu_seqlens.tolist()]
    check_each(name, argument, bounds, [total] * len(bounds), "the rows there are")
    ends = [stop if stop >= start else total for start, stop in zip(bounds, bounds[1:])]
    return bounds[:-1], [end - start for start, end in zip(bounds, ends)]


def spans(
    name: str,
    side: str,
    cu_seqlens: Optional[Tensor],
    seqused: Optional[Tensor],
    x: Tensor,
    b: int,
    max_seqlen: Optional[int],
) -> tuple[list[int], list[int]]:
    """First row and number of rows of each sequence of q or k."""
    if cu_seqlens is None:
        starts, lengths = [0] * b, [x.shape[1]] * b
    elif seqused is not None:
        starts, lengths = _starts(name, f"cu_seqlens_{side}", cu_seqlens, x.shape[0])
    else:
        bounds = offsets(name, f"cu_seqlens_{side}", cu_seqlens, x.shape[0])
        starts, lengths = bounds[:-1], [stop - start for start, stop in zip(bounds, bounds[1:])]
    if seqused is not None:
        used = ints(seqused, b)
        check_each(name, f"seqused_{side}", used, lengths, "the rows that its sequence has")
        lengths = used
    if cu_seqlens is not None:
        check_longest(name, f"max_seqlen_{side}", lengths, max_seqlen)
    return starts, lengths


def check_longest(name: str, argument: str, lengths: list[int], max_seqlen: Optional[int]) -> None:
    """ValueError unless `max_seqlen`, if given, bounds the lengths."""
    longest = max(lengths, default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(
            f"{name}: {argument} is {max_seqlen}, but the longest sequence has {longest} "
            f"rows (sequence {lengths.index(longest)}); it must be at least that"
        )


def paged_lengths(name: str, seqs: Sequences, k: Tensor, b: int) -> list[int]:
    """Key lengths of paged sequences: `seqused_k`, else what `cu_seqlens_k` counts, else all."""
    assert seqs.block_table is not None
    pages, page_size = seqs.block_table.shape[1], k.shape[1]
    capacity = pages * page_size
    why = f"the keys that block_table addresses ({pages} pages of {page_size})"
    if seqs.seqused_k is not None:
        lengths = ints(seqs.seqused_k, b)
        check_each(name, "seqused_k", lengths, [capacity] * b, why)
    elif seqs.cu_seqlens_k is not None:
        lengths = [int(n) for n in seqs.cu_seqlens_k.diff().tolist()]
        for i, length in enumerate(lengths):
            what = f"cu_seqlens_k[{i + 1}] - cu_seqlens_k[{i}]"
            check(name, what, length, 0, capacity, why)
    else:
        lengths = [capacity] * b
    check_longest(name, "max_seqlen_k", lengths, seqs.max_seqlen_k)
    return lengths


def cache_rows(name: str, seqs: Sequences, k: Tensor, b: int) -> list[int]:
    """Row of the cache, or of the block table, that each sequence reads."""
    if seqs.kv_batch_idx is None:
        return list(range(b))
    rows = ints(seqs.kv_batch_idx, b)
    last = (k if seqs.block_table is None else seqs.block_table).shape[0] - 1
    of = "the cache" if seqs.block_table is None else "block_table"
    check_each(name, "cache_batch_idx", rows, [last] * b, f"the last row of {of}")
    return rows


def pages_of(name: str, block_table: Tensor, row: int, length: int, k: Tensor) -> Tensor:
    """Indices of the pages that hold the first `length` keys of a row of the table."""
    pages = block_table[row, : -(-length // k.shape[1])].to(torch.int64)
    outside = ((pages < 0) | (pages >= k.shape[0])).nonzero()
    if len(outside):
        at = int(outside[0])
        last = k.shape[0] - 1
        check(name, f"block_table[{row}, {at}]", int(pages[at]), 0, last, "the last page")
    return pages
