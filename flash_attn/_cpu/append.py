"""Writes new keys and values into a cache, rotated if asked, and returns the call without them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flash_attn._cpu.pieces import batch_size, cache_rows, cut, offsets, pages_of
from flash_attn._problem import Append, Forward
from flash_attn._rotary import batch_positions, rotate, varlen_positions


def append_to_cache(call: Forward, name: str) -> Forward:
    """The call that attends to the grown cache, with rotated queries.

    The cache length before the append is `seqused_k`. Every length, index and position of both
    steps is checked before the first write, so that a ValueError leaves the cache as it was.
    """
    append, seqs = call.append, call.sequences
    assert append is not None
    assert seqs.seqused_k is not None
    b = batch_size(call.q, seqs)
    if append.cu_seqlens is None:
        starts = [i * append.k.shape[1] for i in range(b + 1)]
    else:
        starts = offsets(name, "cu_seqlens_k_new", append.cu_seqlens, append.k.shape[0])
    before = seqs.seqused_k.to(torch.int64)
    after = before + torch.tensor(starts).diff()
    slots = _slots(call, before.tolist(), after.tolist(), name)
    first = before if append.rotary_seqlens is None else append.rotary_seqlens.to(torch.int64)
    positions_q = _query_positions(call, first)
    _check_rotary_positions(append, first, first + after - before, positions_q, name)
    grown = replace(call, append=None, sequences=replace(seqs, seqused_k=after))
    for _ in cut(grown, name):
        pass

    new_k, new_v = (x.flatten(0, 1) if x.dim() == 4 else x for x in (append.k, append.v))
    for i, slot in enumerate(slots):
        new = slice(starts[i], starts[i + 1])
        positions = batch_positions(starts[i + 1] - starts[i], first[i], first.device)
        call.k[slot] = _rotated(append, new_k[new], positions)
        call.v[slot] = new_v[new]
    return replace(grown, q=_rotated(append, call.q, positions_q))


def _slots(
    call: Forward, before: list[int], after: list[int], name: str
) -> list[tuple[Tensor | int, Tensor]]:
    """Index into the cache of the new keys of each sequence."""
    seqs = call.sequences
    table, page_size = seqs.block_table, call.k.shape[1]
    capacity = page_size if table is None else table.shape[1] * page_size
    if any(start < 0 or stop > capacity for start, stop in zip(before, after)):
        raise ValueError(
            f"{name}: cache_seqlens is {before} and would grow to {after} by the keys appended; "
            f"the cache holds {capacity} keys a sequence"
        )
    slots: list[tuple[Tensor | int, Tensor]] = []
    for row, start, stop in zip(cache_rows(name, seqs, call.k, len(before)), before, after):
        positions = torch.arange(start, stop)
        if table is None:
            slots.append((row, positions))
        else:
            pages = pages_of(name, table[row], stop, call.k)
            slots.append((pages[positions // page_size], positions % page_size))
    return slots


def _check_rotary_positions(
    append: Append, first: Tensor, stop: Tensor, positions_q: Tensor, name: str
) -> None:
    """New keys of a sequence stand at positions `first` to `stop`, (b,) each."""
    if append.rotary_cos is None:
        return
    if bool((first < 0).any()):
        raise ValueError(
            f"{name}: rotary_seqlens is {first.tolist()}; a position must not be negative"
        )
    needed = max(int(x.max()) for x in (stop, positions_q + 1) if x.numel())
    if needed > append.rotary_cos.shape[0]:
        raise ValueError(
            f"{name}: rotary_cos has {append.rotary_cos.shape[0]} positions, but {needed} are "
            "needed; cos/sin seqlen must be at least the seqlen of KV cache in use"
        )


def _query_positions(call: Forward, first: Tensor) -> Tensor:
    """Rotary position of each query: (b, sq), or (total_q,) for packed queries.

    Under a causal or local mask query i stands beside new key i; otherwise all stand at the first.
    """
    stays, cu_seqlens, sq = call.scores.mask.is_full, call.sequences.cu_seqlens_q, call.q.shape[-3]
    if cu_seqlens is None:
        return first[:, None].expand(-1, sq) if stays else batch_positions(sq, first, first.device)
    moving = varlen_positions(sq, cu_seqlens, first)
    return moving - varlen_positions(sq, cu_seqlens) if stays else moving


def _rotated(append: Append, x: Tensor, positions: Tensor) -> Tensor:
    if append.rotary_cos is None or append.rotary_sin is None:
        return x
    return rotate(x, append.rotary_cos, append.rotary_sin, positions, append.rotary_interleaved)
