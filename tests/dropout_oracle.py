"""Which entries of softmax dropout keeps, one entry at a time, from the documented stream.

The stream is documented in `flash_attn/_cpu/philox.py`; this is a second reading of that text.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from problem_types import Problem
from torch import Tensor

Words = tuple[int, int, int, int]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32_10(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox4x32 (Salmon et al., SC 2011, section 3.3 and figure 2)."""
    a, b, c, d = counter
    for r in range(10):
        key_0, key_1 = ((key[i] + r * _KEY_STEPS[i]) & _WORD for i in range(2))
        high_0, low_0 = divmod(a * _MULTIPLIERS[0], 1 << 32)
        high_1, low_1 = divmod(c * _MULTIPLIERS[1], 1 << 32)
        a, b, c, d = high_1 ^ b ^ key_0, low_1, high_0 ^ d ^ key_1, low_0
    return a, b, c, d


@cache
def _bytes(counter: Words, key: tuple[int, int]) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in philox4x32_10(counter, key))


def keeps(seed: int, offset: int, p: float, head: int, i: int, j: int) -> bool:
    """Whether entry (i, j) of `head` = sequence * hq + query head is kept."""
    lane = 4 * (i % 8) + (j % 8) // 2
    counter = (32 * (j // 32) + lane, i // 16, head, offset & _WORD)
    byte = 8 * (i % 16 // 8) + 2 * (j % 32 // 8) + j % 2
    drawn = _bytes(counter, (seed & _WORD, seed >> 32 & _WORD))[byte]
    return drawn <= math.floor((1 - p) * 255)


def keep_mask(problem: Problem, rng_state: Tensor) -> Tensor:
    """The mask (b, hq, sq, sk) of a row, true where kept."""
    seed, offset = rng_state.tolist()
    _bytes.cache_clear()
    shape = (problem.b, problem.hq, problem.sq, problem.sk)
    mask = torch.zeros(shape, dtype=torch.bool)
    for head in range(problem.b * problem.hq):
        rows = [
            [keeps(seed, offset, problem.dropout_p, head, i, j) for j in range(problem.sk)]
            for i in range(problem.sq)
        ]
        mask[head // problem.hq, head % problem.hq] = torch.tensor(rows)
    return mask
