"""Attention of one piece, block by block: forward with online softmax, and backward.

    forward    S = scores(Q K^T),  O = softmax(S) V,  L = log sum exp(S)
    backward   P = exp(S - L),  D = rowsum(dO * O),  dS = P * (dO V^T - D)
               dV = P^T dO,  dQ = scale * dS K,  dK = scale * dS^T Q

Sources: FlashAttention (arXiv:2205.14135) and FlashAttention-2 (arXiv:2307.08691). The maths runs
in float32, or float64 for float64 inputs. No block exceeds `_BLOCK_ENTRIES` scores, so the extra
memory does not grow with the square of the length. Query heads of one group are stacked as rows
(B, hk, g * rows, d): one matrix product serves them all and K, V are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from flash_attn._cpu.philox import keep_mask
from flash_attn._problem import Mask, Scores, lse_dtype

_BLOCK_ENTRIES = 1 << 18
_KEY_BLOCK = 512
_MIN_ROW_BLOCK = 16


@dataclass(frozen=True, eq=False)
class Operands:
    """Tensors of one piece. q (B, sq, hq, d), k (B, sk, hk, d), v (B, sk, hk, dv), as views.

    `heads` (B * hq,) numbers the (sequence, head) pairs for dropout. `alibi_slopes` is (B, hq) or
    (hq,). `*_descale` are (B, hk).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: Tensor
    scores: Scores
    alibi_slopes: Optional[Tensor] = None
    qv: Optional[Tensor] = None
    q_descale: Optional[Tensor] = None
    k_descale: Optional[Tensor] = None
    v_descale: Optional[Tensor] = None

    @property
    def sq(self) -> int:
        return self.q.shape[1]

    @property
    def sk(self) -> int:
        return self.k.shape[1]

    @property
    def num_heads_k(self) -> int:
        return self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return lse_dtype(self.q.dtype)

    def rows(self, x: Tensor, rows: range, descale: Optional[Tensor] = None) -> Tensor:
        """Rows of a tensor with q's or k's layout as (B, hk, g * len(rows), d), g = h / hk."""
        block = x[:, rows.start : rows.stop].to(self.dtype)
        stacked = block.unflatten(2, (self.num_heads_k, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return stacked if descale is None else stacked * descale.to(self.dtype)[..., None, None]

    def unstack(self, block: Tensor, num_heads: int, num_rows: int) -> Tensor:
        """The inverse of `rows`: (B, hk, g * num_rows, d) to (B, num_rows, num_heads, d)."""
        group = num_heads // self.num_heads_k
        return block.unflatten(2, (group, num_rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def forward(x: Operands, out: Tensor, lse: Tensor) -> None:
    """Write out (B, sq, hq, dv) and lse (B, hq, sq) in place."""
    hq, p_scale = x.q.shape[2], 1.0 / (1.0 - x.scores.dropout_p)
    for rows in _row_blocks(x):
        query = _Query(x, rows)
        shape = (*query.q.shape[:-1], 1)
        row_max = query.q.new_full(shape, -torch.inf)
        row_sum = query.q.new_zeros(shape)
        acc = query.q.new_zeros((*shape[:-1], x.v.shape[-1]))
        for cols in _key_blocks(x, rows):
            s = query.scores(cols)
            new_max = torch.maximum(row_max, s.amax(dim=-1, keepdim=True))
            # A row that has seen no key yet has maximum -inf; 0 keeps exp(-inf - max) at 0.
            shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
            p = torch.exp(s - shift)
            correction = torch.exp(row_max - shift)
            row_sum = row_sum * correction + p.sum(dim=-1, keepdim=True)
            acc = acc * correction + _drop(p, query.kept(cols)) @ x.rows(x.v, cols, x.v_descale)
            row_max = new_max
        is_empty = row_sum == 0
        acc = acc * p_scale / row_sum.masked_fill(is_empty, 1.0)
        row_lse = (row_max + torch.log(row_sum)).masked_fill(is_empty, torch.inf)
        out[:, rows.start : rows.stop] = x.unstack(acc, hq, len(rows)).to(out.dtype)
        lse[:, :, rows.start : rows.stop] = x.unstack(row_lse, hq, len(rows))[..., 0].transpose(
            1, 2
        )


def backward(
    x: Operands, dout: Tensor, delta: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Write dq, dk, dv (B, s, h, d) in place, from lse and delta = rowsum(dO * O), (B, hq, sq)."""
    scale, softcap = x.scores.softmax_scale, x.scores.softcap
    p_scale = 1.0 / (1.0 - x.scores.dropout_p)
    keys = range(x.sk)
    dk_sum = torch.zeros_like(x.rows(x.k, keys))
    dv_sum = torch.zeros_like(x.rows(x.v, keys))
    for rows in _row_blocks(x):
        query = _Query(x, rows)
        dout_rows = x.rows(dout, rows)
        lse_rows, delta_rows = (
            x.rows(row_data.transpose(1, 2)[..., None], rows) for row_data in (lse, delta)
        )
        dq_rows = torch.zeros_like(query.q)
        for cols in _key_blocks(x, rows):
            block = slice(cols.start, cols.stop)
            kept = query.kept(cols)
            p = torch.exp(query.scores(cols) - lse_rows)
            dv_sum[:, :, block] += _drop(p, kept).transpose(-1, -2) @ dout_rows * p_scale
            dp = _drop(dout_rows @ x.rows(x.v, cols).transpose(-1, -2), kept) * p_scale
            ds = p * (dp - delta_rows) * scale
            if softcap > 0:
                ds = ds * (1.0 - query.tanh(cols) ** 2)
            dq_rows += ds @ x.rows(x.k, cols)
            dk_sum[:, :, block] += ds.transpose(-1, -2) @ query.q
        dq[:, rows.start : rows.stop] = x.unstack(dq_rows, x.q.shape[2], len(rows)).to(dq.dtype)
    dk.copy_(x.unstack(dk_sum, x.num_heads_k, x.sk))
    dv.copy_(x.unstack(dv_sum, x.num_heads_k, x.sk))


def signed_softmax(x: Operands, s_dmask: Tensor) -> None:
    """Write exp(s - row max) into s_dmask (B, hq, >= sq, >= sk), negative where dropped.

    The row maximum comes from a first pass over the keys. No visible entry rounds to zero, so that
    a dropped one keeps its sign.
    """
    tiny = torch.finfo(s_dmask.dtype).tiny
    for rows in _row_blocks(x):
        query = _Query(x, rows)
        row_max = torch.full_like(query.q[..., :1], -torch.inf)
        for cols in _key_blocks(x, rows):
            row_max = torch.maximum(row_max, query.scores(cols).amax(dim=-1, keepdim=True))
        for cols in _key_blocks(x, rows):
            s = query.scores(cols)
            p = torch.exp(s - row_max).clamp_min(tiny)
            kept = query.kept(cols)
            signed = p if kept is None else torch.where(kept, p, -p)
            signed = signed.masked_fill(s == -torch.inf, 0.0)
            heads = signed.unflatten(2, (-1, len(rows))).flatten(1, 2)
            s_dmask[:, :, rows.start : rows.stop, cols.start : cols.stop] = heads


def _drop(p: Tensor, kept: Optional[Tensor]) -> Tensor:
    """p with the dropped entries set to zero, not rescaled."""
    return p if kept is None else p * kept


class _Query:
    """A block of queries, and its scores against any block of keys: (B, hk, g * rows, cols)."""

    def __init__(self, x: Operands, rows: range) -> None:
        self.x, self.row_range = x, rows
        self.q = x.rows(x.q, rows, x.q_descale)
        self.qv = None if x.qv is None else x.rows(x.qv, rows)

    def tanh(self, cols: range) -> Tensor:
        """tanh(s / softcap) of the scaled scores s."""
        return torch.tanh(self._scaled(cols) / self.x.scores.softcap)

    def scores(self, cols: range) -> Tensor:
        """Scores after scale, softcap, ALiBi and mask; -inf where a key is not visible."""
        softcap = self.x.scores.softcap
        s = self.tanh(cols) * softcap if softcap > 0 else self._scaled(cols)
        distance = self._distance(cols)
        if self.x.alibi_slopes is not None:
            slopes = self.x.alibi_slopes.to(s.dtype).expand(s.shape[0], -1)
            bias = slopes[..., None, None] * distance.abs()
            s = s - bias.unflatten(1, (s.shape[1], -1)).flatten(2, 3)
        hidden = _hidden(self.x.scores.mask, distance, cols)
        if hidden is not None:
            group = s.shape[2] // len(self.row_range)
            s = s.masked_fill(hidden.repeat(group, 1), -torch.inf)
        return s

    def kept(self, cols: range) -> Optional[Tensor]:
        """Which entries dropout keeps, shaped like the scores; None without dropout."""
        scores = self.x.scores
        if scores.rng_state is None:
            return None
        kept = keep_mask(scores.rng_state, scores.dropout_p, self.x.heads, self.row_range, cols)
        return kept.unflatten(0, (self.q.shape[0], self.q.shape[1], -1)).flatten(2, 3)

    def _scaled(self, cols: range) -> Tensor:
        x = self.x
        s = self.q @ x.rows(x.k, cols, x.k_descale).transpose(-1, -2)
        if self.qv is not None:
            s = s + self.qv @ x.rows(x.v, cols, x.v_descale).transpose(-1, -2)
        return s * x.scores.softmax_scale

    def _distance(self, cols: range) -> Tensor:
        """i + sk - sq - j, (rows, cols): how far key j lies behind the diagonal."""
        diagonal = torch.arange(self.row_range.start, self.row_range.stop) + self.x.sk - self.x.sq
        return diagonal[:, None] - torch.arange(cols.start, cols.stop)


def _hidden(mask: Mask, distance: Tensor, cols: range) -> Optional[Tensor]:
    """Which keys of a block are not visible, (rows, cols); None if all are."""
    if mask.is_full:
        return None
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if mask.left >= 0:
        hidden |= distance > mask.left
    if mask.right >= 0:
        hidden |= distance < -mask.right
    if mask.chunk:
        keys = torch.arange(cols.start, cols.stop)
        chunk_of = (distance + keys).div(mask.chunk, rounding_mode="floor")
        hidden |= chunk_of != keys.div(mask.chunk, rounding_mode="floor")
    return hidden


def _row_blocks(x: Operands) -> Iterator[range]:
    """Blocks of queries, sized so that a block of scores stays within the budget."""
    heads = x.q.shape[0] * x.q.shape[2]
    entries_per_row = max(1, heads * min(x.sk, _KEY_BLOCK))
    size = max(_MIN_ROW_BLOCK, _BLOCK_ENTRIES // entries_per_row)
    return (range(start, min(start + size, x.sq)) for start in range(0, x.sq, size))


def _key_blocks(x: Operands, rows: range) -> Iterator[range]:
    """Blocks of the keys that any of the rows sees; keys outside mask and window are skipped."""
    mask, diagonal = x.scores.mask, x.sk - x.sq
    first, last = rows.start + diagonal, rows.stop - 1 + diagonal
    start, stop = 0, x.sk
    if mask.left >= 0:
        start = max(start, first - mask.left)
    if mask.right >= 0:
        stop = min(stop, last + mask.right + 1)
    if mask.chunk:
        start = max(start, first // mask.chunk * mask.chunk)
        stop = min(stop, (last // mask.chunk + 1) * mask.chunk)
    return (range(at, min(at + _KEY_BLOCK, stop)) for at in range(start, stop, _KEY_BLOCK))
