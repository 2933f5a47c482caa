"""Standard attention: softmax(q k^T) v with the whole score matrix in memory.

What the package is compared with, in the demo and in the benchmarks. Nothing here is tuned: the
point is the textbook formula, in whatever precision the inputs have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible(
    sq: int, sk: int, causal: bool, window: tuple[int, int], device: torch.device
) -> Tensor:
    """(sq, sk) bool: True where the query may see the key; the last query faces the last key."""
    i = torch.arange(sq, device=device)[:, None] + sk - sq
    j = torch.arange(sk, device=device)[None, :]
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """Attention of q (b, sq, hq, d) over k, v (b, sk, hk, d), computed in the inputs' dtype."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal or max(window) >= 0:
        seen = visible(q.shape[1], k.shape[1], causal, window, q.device)
        scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
