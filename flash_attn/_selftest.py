"""A quick check of this installation: small calls against standard attention in float64.

The rule is that of the tests: an error is at most twice that of the same formula, run by torch in
the precision of the call, plus a tiny absolute term.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_attn import flash_attn_interface as functions

_B, _S, _HQ, _HK, _D = 2, 100, 4, 2, 64
_ATOL = 1e-5


@dataclass(frozen=True)
class Outcome:
    """One check: its error and the error that the rule allows."""

    device: str
    name: str
    error: float
    allowed: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def standard_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on (b, s, h, d), with the whole matrix of scores."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    rows = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    distance = rows - torch.arange(k.shape[1], device=q.device)
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def _dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return functions.flash_attn_func(q, k, v, **options)


def _varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    cu_seqlens = torch.arange(0, _B * _S + 1, _S, dtype=torch.int32, device=q.device)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = functions.flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen_q=_S, max_seqlen_k=_S, **options
    )
    return out.unflatten(0, (_B, _S))


def _kvcache(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Everything but the last 10 keys stands in the cache; those are appended."""
    old = _S - 10
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    k_cache[:, :old], v_cache[:, :old] = k[:, :old], v[:, :old]
    return functions.flash_attn_with_kvcache(
        q, k_cache, v_cache, k=k[:, old:], v=v[:, old:], cache_seqlens=old, **options
    )


_Call = Callable[..., Tensor]
_CHECKS: tuple[tuple[str, _Call, bool, tuple[int, int], bool], ...] = (
    ("forward and backward", _dense, False, (-1, -1), True),
    ("causal, forward and backward", _dense, True, (-1, -1), True),
    ("window, forward and backward", _dense, False, (20, 5), True),
    ("packed sequences, causal, forward and backward", _varlen, True, (-1, -1), True),
    ("KV cache with append, causal", _kvcache, True, (-1, -1), False),
)


def num_checks(devices: list[str]) -> int:
    """How many outcomes `run` yields."""
    return len(devices) * len(_CHECKS)


def run(devices: list[str], dtype: torch.dtype = torch.bfloat16) -> Iterator[Outcome]:
    """Each check on each device, in turn."""
    for device in devices:
        generator = torch.Generator().manual_seed(0)
        for name, call, causal, window, has_grad in _CHECKS:
            begin = time.perf_counter()
            q, k, v, dout = (
                torch.randn(_B, _S, h, _D, generator=generator).to(device, dtype)
                for h in (_HQ, _HK, _HK, _HQ)
            )
            ours = partial(call, causal=causal, window_size=window)
            standard = partial(standard_attention, causal=causal, window_size=window)
            exact = _results(standard, (q, k, v), dout, torch.float64, has_grad)
            plain = _results(standard, (q, k, v), dout, dtype, has_grad)
            got = _results(ours, (q, k, v), dout, dtype, has_grad)
            error = max(_distance(x, y) for x, y in zip(got, exact))
            allowed = 2 * max(_distance(x, y) for x, y in zip(plain, exact)) + _ATOL
            yield Outcome(device, name, error, allowed, time.perf_counter() - begin)


def _results(
    call: _Call, inputs: tuple[Tensor, ...], dout: Tensor, dtype: torch.dtype, has_grad: bool
) -> list[Tensor]:
    """out, and the gradients of q, k and v if asked for."""
    leaves = [x.to(dtype).requires_grad_(has_grad) for x in (y.detach() for y in inputs)]
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, dout.to(dtype)) if has_grad else ()
    return [out.detach(), *grads]


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x.to(torch.float64) - y.to(torch.float64)).abs().max())
