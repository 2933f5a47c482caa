"""How a forward call is spread over programs: packing of heads, splits of the keys, tile sizes."""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor

from flash_attn import _support
from flash_attn._problem import Forward, Sequences
from flash_attn._triton.launch import Config, configs, num_processors

_DECODE_ROWS = 16
# Packing costs the coalesced loads of Q: it pays where tiles would stay empty.
_PACKED_ROWS = 64
_KEYS_PER_SPLIT = 256


class Plan(NamedTuple):
    """`group` heads share a tile's rows; `rows` of a sequence, `others` beside them in the grid."""

    tiles: tuple[Config, ...]
    group: int
    num_splits: int
    rows: int
    others: int


def plan_forward(call: Forward) -> Plan:
    q, k, seqs = call.q, call.k, call.sequences
    hq, hk = q.shape[-2], k.shape[-2]
    has_dropout = call.scores.rng_state is not None
    sq = longest(q, seqs.max_seqlen_q)
    group = hq // hk if not has_dropout and sq * (hq // hk) <= _PACKED_ROWS else 1
    kind = "decode" if sq * group <= _DECODE_ROWS else "forward"
    tiles = configs(kind, q.shape[-1], call.v.shape[-1])
    programs = -(-sq * group // tiles[0].rows) * (hq // group) * batch_size(q, seqs)
    most = -(-_longest_keys(call) // tiles[0].columns)
    wanted = call.num_splits
    if has_dropout:
        wanted = 1
    elif wanted == 0:
        free = num_processors(q.device) // max(programs, 1)
        wanted = min(free, -(-_longest_keys(call) // _KEYS_PER_SPLIT), _support.MAX_SPLITS_FA2)
    num_splits = max(1, min(wanted, most))
    others = num_splits * (hq // group) * batch_size(q, seqs)
    return Plan(tiles, group, num_splits, sq * group, others)


def batch_size(q: Tensor, seqs: Sequences) -> int:
    return q.shape[0] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.shape[0] - 1


def longest(x: Tensor, max_seqlen: Optional[int]) -> int:
    """Bound on the rows of a sequence of q or of k, which is not paged."""
    if x.dim() == 4:
        return x.shape[1]
    return x.shape[0] if max_seqlen is None else min(x.shape[0], max_seqlen)


def _longest_keys(call: Forward) -> int:
    k, table = call.k, call.sequences.block_table
    if table is not None:
        return k.shape[1] * table.shape[1]
    return longest(k, call.sequences.max_seqlen_k)
