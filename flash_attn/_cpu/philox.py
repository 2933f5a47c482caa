"""The dropout stream: which entries of softmax are kept, as a pure function of `rng_state`.

Every backend draws the same bits, so a backward pass (or another backend) reproduces a forward
pass from two integers. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011). One call yields 16 bytes, and a tile of 16 rows x 32 columns takes 32
calls, one for each lane of a warp that holds the tile as `mma.m16n8` accumulators: so a CUDA kernel
needs one call for 16 entries and no exchange between lanes.

For sequence s, query head h, row i and column j (counted from the sequence's first query and key):

    key      = (low word of rng_state[0], high word of rng_state[0])
    counter  = (32 * (j // 32) + lane, i // 16, s * hq + h, low word of rng_state[1])
    lane     = 4 * (i % 8) + (j % 8) // 2
    byte     = 8 * (i % 16 // 8) + 2 * (j % 32 // 8) + j % 2     of the call's 16, little-endian
    keep     iff byte <= floor((1 - dropout_p) * 255)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TILE_ROWS, _TILE_COLS = 16, 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words from a counter of four words, all int64 tensors that hold 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps modulo 2^64; shift and mask take its two words, sign bit or not.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> 32 & _WORD) ^ c1 ^ k0,
            right & _WORD,
            (left >> 32 & _WORD) ^ c3 ^ k1,
            left & _WORD,
        )
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def keep_threshold(dropout_p: float) -> int:
    """The largest byte that keeps an entry."""
    return math.floor((1.0 - dropout_p) * 255.0)


def keep_mask(
    rng_state: Tensor, dropout_p: float, heads: Tensor, rows: range, cols: range
) -> Tensor:
    """Kept entries of a block of rows and columns, for each of some heads.

    Args:
        rng_state: (2,) int64.
        heads: (n,) int64, s * hq + h for each head wanted.
        rows, cols: contiguous ranges, counted from the sequence's first query and key.

    Returns:
        bool (n, len(rows), len(cols)).
    """
    seed, offset = (int(word) for word in rng_state.tolist())
    tile_rows = torch.arange(rows.start // _TILE_ROWS, -(-rows.stop // _TILE_ROWS))
    tile_cols = torch.arange(cols.start // _TILE_COLS, -(-cols.stop // _TILE_COLS))
    lanes = torch.arange(_TILE_COLS)
    shape = (len(heads), len(tile_rows), len(tile_cols), len(lanes))
    counter = (
        (tile_cols[:, None] * _TILE_COLS + lanes).expand(shape),
        tile_rows[:, None, None].expand(shape),
        heads[:, None, None, None].expand(shape),
        torch.full((), offset & _WORD).expand(shape),
    )
    words = torch.stack(philox_4x32(counter, (seed & _WORD, seed >> 32 & _WORD)), dim=-1)
    shifts = torch.tensor([0, 8, 16, 24])
    kept = (words[..., None] >> shifts & 0xFF) <= keep_threshold(dropout_p)
    # A lane is (row % 8, column pair); its bytes are (row half, group of 8 columns, parity).
    tiles = kept.reshape(*shape[:3], 8, 4, 2, 4, 2).permute(0, 1, 5, 3, 2, 6, 4, 7)
    block = tiles.reshape(len(heads), len(tile_rows) * _TILE_ROWS, len(tile_cols) * _TILE_COLS)
    row0, col0 = rows.start % _TILE_ROWS, cols.start % _TILE_COLS
    return block[:, row0 : row0 + len(rows), col0 : col0 + len(cols)]
