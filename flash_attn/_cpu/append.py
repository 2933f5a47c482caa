"""Writes new keys and values into a cache, rotated if asked, and returns the call without them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_attn._cpu.pieces import cut
from flash_attn._cpu.tables import batch_size, cache_rows, check_each, offsets, pages_of
from flash_attn._problem import Append, Forward
from flash_attn._rotary import batch_positions, rotate, varlen_positions


def append_to_cache(call: Forward, name: str) -> Forward:
    """The call that attends to the grown cache, with rotated queries.

    The cache length before the append is `seqused_k`. Every length, index and position of both
    steps is checked before the first write, so that a ValueError leaves the cache as it was.
    """
    plan, append = plan_append(call, name), call.append
    assert append is not None
    new_k, new_v = (x.flatten(0, 1) if x.dim() == 4 else x for x in (append.k, append.v))
    caches = {x.untyped_storage().data_ptr() for x in (call.k, call.v)}
    # Rows of the cache itself would be read after others were written.
    new_k, new_v = (
        x.clone() if x.untyped_storage().data_ptr() in caches else x for x in (new_k, new_v)
    )
    for slot, start, stop, first in zip(plan.slots, plan.starts, plan.starts[1:], plan.first):
        positions = batch_positions(stop - start, first, first.device)
        call.k[slot] = _rotated(append, new_k[start:stop], positions)
        call.v[slot] = new_v[start:stop]
    return replace(plan.grown, q=_rotated(append, call.q, plan.positions_q))


@dataclass(frozen=True, eq=False)
class Plan:
    """Where new keys go: of sequence i those from `starts[i]` on, to `slots[i]` of the cache, at
    rotary positions from `first[i]` on. `grown` is the call over the cache with them.
    """

    starts: list[int]
    slots: list[tuple[Tensor | int, Tensor]]
    first: Tensor
    positions_q: Tensor
    grown: Forward


def plan_append(call: Forward, name: str) -> Plan:
    """The plan of a call whose lengths, indices and positions are in range; else ValueError."""
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
    return Plan(starts, slots, first, positions_q, grown)


def _slots(
    call: Forward, before: list[int], after: list[int], name: str
) -> list[tuple[Tensor | int, Tensor]]:
    """Index into the cache of the new keys of each sequence."""
    seqs = call.sequences
    table, page_size = seqs.block_table, call.k.shape[1]
    capacity = page_size if table is None else table.shape[1] * page_size
    room = [capacity - (stop - start) for start, stop in zip(before, after)]
    why = f"the {capacity} keys that a sequence of the cache holds, less those appended"
    check_each(name, "cache_seqlens", before, room, why)
    slots: list[tuple[Tensor | int, Tensor]] = []
    for row, start, stop in zip(cache_rows(name, seqs, call.k, len(before)), before, after):
        positions = torch.arange(start, stop)
        if table is None:
            slots.append((row, positions))
        else:
            pages = pages_of(name, table, row, stop, call.k)
            slots.append((pages[positions // page_size], positions % page_size))
    return slots


def _check_rotary_positions(
    append: Append, first: Tensor, stop: Tensor, positions_q: Tensor, name: str
) -> None:
    """New keys of a sequence stand at positions `first` to `stop`, (b,) each."""
    if append.rotary_cos is None:
        return
    for i, position in enumerate(first.tolist()):
        if position < 0:
            raise ValueError(
                f"{name}: rotary_seqlens[{i}] is {position}; a position must not be negative"
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
