"""From products q k^T to scores: scale, softcap and ALiBi, in units of log 2.

Plain scores stay products until the exponential: `exp2(s * factor - m)` is one instruction with the
scale as its factor. All others come out finished, with factor 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_attn._triton.numbers import LOG2_E, tanh


@triton.jit
def scored(s, distance, slopes, scale, softcap, IS_PLAIN: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """(scores, tanh of the softcap) of products s.

    distance: i + sk - sq - j of each entry. slopes: ALiBi slope of each entry or None; they, like
    `distance`, broadcast to s.
    """
    cap = s
    if not IS_PLAIN:
        s = s * scale
        if HAS_SOFTCAP:
            cap = tanh(s / softcap)
            s = softcap * cap
        if slopes is not None:
            s -= slopes * tl.abs(distance).to(tl.float32)
        s *= LOG2_E
    return s, cap
