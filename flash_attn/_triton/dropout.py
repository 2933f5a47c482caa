"""The dropout stream in a kernel: the same bits as `flash_attn/_cpu/philox.py`, whose layout it is.

A Philox call yields the 16 bytes of rows i, i + 8 and columns j, j + 1, j + 8, j + 9, ... of a tile
of 16 x 32. A block of scores draws its calls as one small tensor and reshapes the bytes into place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(rng_state, threshold, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which entries of a block (ROWS, COLUMNS) are kept.

    head: s * hq + h. row: the block's first, a multiple of 16. column: a multiple of 32.
    """
    seed, offset = tl.load(rng_state), tl.load(rng_state + 1)
    # Dimensions: tile of 16 rows, row in 8, tile of 32 columns, pair of columns in 8.
    SHAPE: tl.constexpr = [ROWS // 16, 8, COLUMNS // 32, 4]
    tile_row = row // 16 + tl.reshape(tl.arange(0, ROWS // 16), [ROWS // 16, 1, 1, 1])
    tile_column = column // 32 + tl.reshape(tl.arange(0, COLUMNS // 32), [1, 1, COLUMNS // 32, 1])
    lane = tl.reshape(tl.arange(0, 32), [1, 8, 1, 4])
    zero = tl.zeros(SHAPE, tl.int32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        tile_column * 32 + lane + zero,
        tile_row + zero,
        head + zero,
        offset.to(tl.int32) + zero,
    )
    # Words 0 and 1 are the upper 8 rows, 2 and 3 the lower; each word holds 2 x 8 columns' pairs.
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    bytes_first, bytes_last = words & 0xFFFF, words >> 16
    groups = tl.join(bytes_first, bytes_last)
    entries = tl.join(groups & 0xFF, groups >> 8)
    is_kept = (entries <= threshold).to(tl.int8)
    # Then: half of the columns' groups, half of the rows, group, parity.
    ordered = tl.permute(is_kept, [0, 5, 1, 2, 4, 6, 3, 7])
    return tl.reshape(ordered, [ROWS, COLUMNS]) != 0
