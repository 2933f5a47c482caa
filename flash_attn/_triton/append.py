"""Writes new keys and values into a cache, rotated if asked, and returns the call without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flash_attn._problem import Append, Forward
from flash_attn._triton.launch import Config, launch, padded, strides
from flash_attn._triton.numbers import kernel, wide
from flash_attn._triton.rotary import rotate_into
from flash_attn._triton.sequences import pages_at, span

_TILES = (Config(16, 16, 4, 1),)


@kernel
def append_kernel(
    cache, new, cache_b, cache_s, cache_h, cache_d, new_b, new_s, new_h, new_d,
    cu_seqlens, room_new, lengths, batch_idx, rows_of_cache,
    table, table_b, page_size, num_pages, room, hk, num_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of `new` behind the `lengths` of a cache. Grid: blocks of rows x hk x b.

    A slot that the cache does not have (its length, page or row lies outside) is not written.
    """
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    head, b = rest % hk, rest // hk
    start, rows = span(cu_seqlens, None, room_new, b)
    first = block * ROWS
    if first >= rows:
        return
    i = first + tl.arange(0, ROWS)
    position = tl.load(lengths + b) + i
    row = wide(b)
    if batch_idx is not None:
        row = wide(tl.load(batch_idx + b))
    capacity = tl.where((row >= 0) & (row < rows_of_cache), room, 0)
    is_slot = (position >= 0) & (position < capacity)
    if table is None:
        slot = row * cache_b + wide(position) * cache_s
    else:
        page = pages_at(table + row * table_b, position, page_size, num_pages, capacity)
        is_slot = is_slot & (page >= 0)
        slot = wide(page) * cache_b + wide(position % page_size) * cache_s
    dims = tl.arange(0, BLOCK_D)[None, :]
    is_there = ((i < rows) & is_slot)[:, None] & (dims < D)
    new += wide(b) * new_b + wide(head) * new_h + wide(start + i)[:, None] * new_s
    values = tl.load(new + dims * new_d, mask=is_there, other=0.0)
    cache += wide(head) * cache_h + slot[:, None]
    tl.store(cache + dims * cache_d, values, mask=is_there)


def append_to_cache(call: Forward) -> Forward:
    """The call that attends to the grown cache, with rotated queries.

    The cache length before the append is `seqused_k`.
    """
    append, seqs = call.append, call.sequences
    assert append is not None
    before = seqs.seqused_k
    assert before is not None
    first = before if append.rotary_seqlens is None else append.rotary_seqlens
    new_k = _rotated(append, append.k, first, cu_seqlens=append.cu_seqlens)
    # Without a mask every query stands beside the first new key.
    q = _rotated(
        append, call.q, first, cu_seqlens=seqs.cu_seqlens_q, moves=not call.scores.mask.is_full
    )
    for cache, new in ((call.k, new_k), (call.v, append.v)):
        _write(call, append, cache, new)
    if append.cu_seqlens is None:
        after = before + append.k.shape[1]
    else:
        after = before + append.cu_seqlens.diff()
    return replace(call, q=q, append=None, sequences=replace(seqs, seqused_k=after))


def _rotated(append: Append, x: Tensor, first: Tensor, **options: Any) -> Tensor:
    if append.rotary_cos is None or append.rotary_sin is None:
        return x
    out = x.clone(memory_format=torch.contiguous_format)
    cos, sin = append.rotary_cos, append.rotary_sin
    rotate_into(out, x, cos, sin, first, interleaved=append.rotary_interleaved, **options)
    return out


def _write(call: Forward, append: Append, cache: Tensor, new: Tensor) -> None:
    seqs, table = call.sequences, call.sequences.block_table
    b = new.shape[0] if append.cu_seqlens is None else append.cu_seqlens.shape[0] - 1
    hk, d = new.shape[-2:]
    args = {
        "cache": cache, "new": new, **strides("cache", cache), **strides("new", new),
        "cu_seqlens": append.cu_seqlens,
        "room_new": new.shape[-3],
        "lengths": seqs.seqused_k,
        **cache_arguments(call),
        "room": cache.shape[1] * (1 if table is None else table.shape[1]),
        "hk": hk,
        "D": d,
        "BLOCK_D": padded(d),
    }  # fmt: skip
    launch(append_kernel, _TILES, "rows", new.shape[-3], hk * b, new.device, args)


def cache_arguments(call: Forward) -> dict[str, Any]:
    """Which row of the cache, or which of its pages, a sequence has."""
    k, seqs, table = call.k, call.sequences, call.sequences.block_table
    return {
        "batch_idx": seqs.kv_batch_idx,
        "rows_of_cache": k.shape[0] if table is None else table.shape[0],
        "table": table,
        "table_b": 0 if table is None else table.stride(0),
        "page_size": 1 if table is None else k.shape[1],
        "num_pages": k.shape[0],
    }
