"""Cuts a call into pieces: sequences of equal lengths, as views that the block maths can batch.

A dense batch is one piece. Packed, padded or paged sequences are one piece each, because their
lengths differ. Only the keys of a paged sequence are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from torch import Tensor

from flash_attn._cpu.tables import (
    batch_size,
    cache_rows,
    check_each,
    ints,
    paged_lengths,
    pages_of,
    spans,
)
from flash_attn._problem import Backward, Forward


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
    starts_q, lengths_q = spans(
        name, "q", seqs.cu_seqlens_q, seqs.seqused_q, call.q, b, seqs.max_seqlen_q
    )
    if seqs.block_table is None:
        starts_k, lengths_k = spans(
            name, "k", seqs.cu_seqlens_k, seqs.seqused_k, call.k, b, seqs.max_seqlen_k
        )
    else:
        starts_k, lengths_k = [0] * b, paged_lengths(name, seqs, call.k, b)
    skipped = ints(seqs.leftpad_k, b)
    check_each(name, "leftpad_k", skipped, lengths_k, "the key length of its sequence")
    rows = cache_rows(name, seqs, call.k, b)
    for i in range(b):
        pages = None
        if seqs.block_table is not None:
            pages = pages_of(name, seqs.block_table, rows[i], lengths_k[i], call.k)
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
