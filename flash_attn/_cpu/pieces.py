"""Cuts a call into pieces: sequences of equal lengths, as views that the block maths can batch.

A dense batch is one piece. Packed, padded or paged sequences are one piece each, because their
lengths differ. Only the keys of a paged sequence are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from flash_attn._problem import Backward, Forward, Sequences


@dataclass(frozen=True)
class Piece:
    """B = `stop` - `start` sequences, each with the same rows of queries and of keys.

    `rows_q` and `rows_k` count from the first row of a packed tensor if it is packed, else from
    the sequence's own. `cache_row` is the row of k and v (or of the block table) that a sequence
    reads; None takes rows `start` to `stop`.
    """

    start: int
    stop: int
    rows_q: slice
    rows_k: slice
    is_packed_q: bool
    is_packed_k: bool
    cache_row: Optional[int] = None
    pages: Optional[Tensor] = None

    def queries(self, x: Tensor) -> Tensor:
        """(B, sq, h, d) view of a tensor laid out like q."""
        return x[self.rows_q][None] if self.is_packed_q else x[self.start : self.stop, self.rows_q]

    def keys(self, x: Tensor) -> Tensor:
        """(B, sk, h, d) of a tensor laid out like k: a view, or a copy of pages."""
        if self.pages is not None:
            return x[self.pages].flatten(0, 1)[self.rows_k][None]
        if self.is_packed_k:
            return x[self.rows_k][None]
        if self.cache_row is not None:
            return x[self.cache_row : self.cache_row + 1, self.rows_k]
        return x[self.start : self.stop, self.rows_k]

    def lse(self, x: Tensor) -> Tensor:
        """(B, hq, sq) view of a tensor laid out like softmax_lse."""
        return (
            x[:, self.rows_q][None]
            if self.is_packed_q
            else x[self.start : self.stop, :, self.rows_q]
        )

    def per_sequence(self, x: Optional[Tensor]) -> Optional[Tensor]:
        """Rows of this piece from a tensor (b, h); one for all sequences, (h,), stays itself."""
        return x[self.start : self.stop] if x is not None and x.dim() == 2 else x


def cut(call: Forward | Backward, name: str) -> Iterator[Piece]:
    """The pieces of a call, after a check of every length and index that was given as data.

    Raises:
        ValueError: lengths or indices point outside q, k or v; `name` is the op in the message.
    """
    seqs = call.sequences
    if seqs.is_dense:
        b, sq, sk = call.q.shape[0], call.q.shape[1], call.k.shape[1]
        yield Piece(0, b, slice(0, sq), slice(0, sk), False, False)
        return
    b = batch_size(call.q, seqs)
    starts_q, lengths_q = _spans(
        name, "q", seqs.cu_seqlens_q, seqs.seqused_q, call.q, b, seqs.max_seqlen_q
    )
    if seqs.block_table is None:
        starts_k, lengths_k = _spans(
            name, "k", seqs.cu_seqlens_k, seqs.seqused_k, call.k, b, seqs.max_seqlen_k
        )
    else:
        starts_k, lengths_k = [0] * b, _paged_lengths(name, seqs, call.k, b)
    skipped = _ints(seqs.leftpad_k, b)
    _require(
        all(0 <= pad <= length for pad, length in zip(skipped, lengths_k)),
        f"{name}: leftpad_k is {skipped}; each must lie between 0 and its sequence's key length, "
        f"{lengths_k}",
    )
    rows = cache_rows(name, seqs, call.k, b)
    for i in range(b):
        pages = None
        if seqs.block_table is not None:
            pages = pages_of(name, seqs.block_table[rows[i]], lengths_k[i], call.k)
        yield Piece(
            start=i,
            stop=i + 1,
            rows_q=slice(starts_q[i], starts_q[i] + lengths_q[i]),
            rows_k=slice(starts_k[i] + skipped[i], starts_k[i] + lengths_k[i]),
            is_packed_q=seqs.cu_seqlens_q is not None,
            is_packed_k=seqs.cu_seqlens_k is not None and pages is None,
            cache_row=rows[i],
            pages=pages,
        )


def batch_size(q: Tensor, seqs: Sequences) -> int:
    """Number of sequences."""
    return q.shape[0] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.numel() - 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _ints(x: Optional[Tensor], b: int) -> list[int]:
    return [0] * b if x is None else [int(value) for value in x.tolist()]


def offsets(name: str, argument: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """`cu_seqlens` as ints; ValueError unless it never falls and stays in [0, total]."""
    bounds = [int(value) for value in cu_seqlens.tolist()]
    is_rising = all(a <= b for a, b in zip(bounds, bounds[1:]))
    _require(
        bounds[0] >= 0 and is_rising and bounds[-1] <= total,
        f"{name}: {argument} is {bounds}; it must not be negative, never fall, and end at no more "
        f"than the {total} rows there are",
    )
    return bounds


def _starts(
    name: str, argument: str, cu_seqlens: Tensor, total: int
) -> tuple[list[int], list[int]]:
    """First row and room of each sequence where lengths are given apart (`seqused`).

    `cu_seqlens` then only marks where sequences start, in any order (xformers' masks over blocks
    of keys). A sequence has room up to the next mark, or to the end if that lies before.
    """
    bounds = [int(value) for value in cu_seqlens.tolist()]
    _require(
        all(0 <= bound <= total for bound in bounds),
        f"{name}: {argument} is {bounds}; each must lie in the {total} rows there are",
    )
    ends = [stop if stop >= start else total for start, stop in zip(bounds, bounds[1:])]
    return bounds[:-1], [end - start for start, end in zip(bounds, ends)]


def _spans(
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
        used = _ints(seqused, b)
        _require(
            all(0 <= n <= length for n, length in zip(used, lengths)),
            f"{name}: seqused_{side} is {used}; each must lie between 0 and the rows that its "
            f"sequence has, {lengths}",
        )
        lengths = used
    if cu_seqlens is not None:
        _check_longest(name, side, lengths, max_seqlen)
    return starts, lengths


def _check_longest(name: str, side: str, lengths: list[int], max_seqlen: Optional[int]) -> None:
    longest = max(lengths, default=0)
    _require(
        max_seqlen is None or longest <= max_seqlen,
        f"{name}: max_seqlen_{side} is {max_seqlen}, but the longest sequence has {longest} rows; "
        "it must be at least that",
    )


def _paged_lengths(name: str, seqs: Sequences, k: Tensor, b: int) -> list[int]:
    """Key lengths of paged sequences: `seqused_k`, else what `cu_seqlens_k` counts, else all."""
    assert seqs.block_table is not None
    capacity = seqs.block_table.shape[1] * k.shape[1]
    if seqs.seqused_k is not None:
        lengths = _ints(seqs.seqused_k, b)
    elif seqs.cu_seqlens_k is not None:
        lengths = [int(n) for n in seqs.cu_seqlens_k.diff().tolist()]
    else:
        lengths = [capacity] * b
    _require(
        all(0 <= n <= capacity for n in lengths),
        f"{name}: block_table addresses {capacity} keys a sequence ({seqs.block_table.shape[1]} "
        f"pages of {k.shape[1]}); the key lengths are {lengths}",
    )
    _check_longest(name, "k", lengths, seqs.max_seqlen_k)
    return lengths


def cache_rows(name: str, seqs: Sequences, k: Tensor, b: int) -> list[int]:
    """Row of the cache, or of the block table, that each sequence reads."""
    if seqs.kv_batch_idx is None:
        return list(range(b))
    rows = _ints(seqs.kv_batch_idx, b)
    limit = k.shape[0] if seqs.block_table is None else seqs.block_table.shape[0]
    _require(
        all(0 <= row < limit for row in rows),
        f"{name}: cache_batch_idx is {rows}; each must lie between 0 and {limit - 1}",
    )
    return rows


def pages_of(name: str, table_row: Tensor, length: int, k: Tensor) -> Tensor:
    """Indices of the pages that hold a sequence's first `length` keys."""
    pages = table_row[: -(-length // k.shape[1])].to(torch.int64)
    _require(
        bool(((pages >= 0) & (pages < k.shape[0])).all()),
        f"{name}: block_table holds {pages.tolist()}; each must lie between 0 and "
        f"{k.shape[0] - 1}, the last page",
    )
    return pages
