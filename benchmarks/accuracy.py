"""Attention in float64, how far results are from it, and inputs that are hard for others."""

from __future__ import annotations

from typing import Any


def distance(x: Any, y: Any) -> float:
    """Of x from y, as a part of y's norm."""
    y = y.double()
    found: float = ((x.double() - y).norm() / y.norm()).item()
    return found


def exact_attention(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """In float64, of tensors (batch, length, heads, head dim) with as many heads each."""
    import torch

    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def with_outliers(x: Any, generator: Any) -> Any:
    """A thousandth of the values ten times as large."""
    import torch

    chosen = torch.rand(x.shape, generator=generator, device=x.device) < 0.001
    return torch.where(chosen, 10 * x, x)
