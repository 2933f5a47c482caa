"""The published quickstart's examples, each beside what standard attention makes of the same input.

The input is real text: the bytes of a file of this repository, embedded and projected to queries,
keys and values by fixed random matrices, so that scores repeat and cluster as they do in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from standard import standard_attention
from torch import Tensor

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2, 384, 8, 2, 64, 128
WINDOW = (64, 0)
SEQUENCE_LENGTHS = (37, 200, 1, 146)
PROMPT_LENGTH = LENGTH - 4


@dataclass(frozen=True)
class Inputs:
    """q (b, s, 8, d); k, v (b, s, 8, d); k_few, v_few (b, s, 2, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_few: Tensor
    v_few: Tensor


@dataclass(frozen=True)
class Example:
    """One way to call the package, and the same through standard attention in any precision."""

    title: str
    call: str
    run: Callable[[Inputs], Tensor]
    standard: Callable[[Inputs], Tensor]


def text_inputs(device: str, dtype: torch.dtype) -> Inputs:
    """Inputs made of the first bytes of `TEXT`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor(list(TEXT.read_bytes()[: BATCH * LENGTH])).view(BATCH, LENGTH)
    hidden = torch.randn(256, WIDTH, generator=generator)[tokens]

    def project(heads: int) -> Tensor:
        weight = torch.randn(WIDTH, heads * HEAD_DIM, generator=generator) / WIDTH**0.5
        return (hidden @ weight).view(BATCH, LENGTH, heads, HEAD_DIM).to(device, dtype)

    return Inputs(*(project(heads) for heads in (HEADS, HEADS, HEADS, KV_HEADS, KV_HEADS)))


def gradients(attention: Callable[[Tensor, Tensor, Tensor], Tensor], x: Inputs) -> Tensor:
    """dq, dk and dv of sum(out^2) / 2, stacked."""
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    out = attention(*leaves)
    return torch.stack(torch.autograd.grad(out, leaves, out.detach()))


def varlen(x: Inputs) -> Tensor:
    """Four sequences end to end, none attending to another."""
    lengths = torch.tensor([0, *SEQUENCE_LENGTHS])
    cu_seqlens = lengths.cumsum(0).to(x.q.device, torch.int32)
    q, k, v = (t[0] for t in (x.q, x.k, x.v))
    longest = max(SEQUENCE_LENGTHS)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)


def standard_varlen(x: Inputs) -> Tensor:
    parts = zip(*(t[:1].split(SEQUENCE_LENGTHS, dim=1) for t in (x.q, x.k, x.v)))
    return torch.cat([standard_attention(*part, causal=True) for part in parts], dim=1)[0]


def kv_cache(x: Inputs) -> Tensor:
    """A prompt, then one token after the other, as in generation."""
    k_cache, v_cache = (torch.zeros_like(t) for t in (x.k_few, x.v_few))
    outs, start = [], 0
    for stop in (PROMPT_LENGTH, *range(PROMPT_LENGTH + 1, LENGTH + 1)):
        q, k, v = (t[:, start:stop] for t in (x.q, x.k_few, x.v_few))
        seqlens = torch.full((BATCH,), start, dtype=torch.int32, device=q.device)
        outs.append(
            flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True)
        )
        start = stop
    return torch.cat(outs, dim=1)


def examples() -> Iterator[Example]:
    """The examples in the order of the README."""
    yield Example(
        "basic",
        "flash_attn_func(q, k, v)",
        lambda x: flash_attn_func(x.q, x.k, x.v),
        lambda x: standard_attention(x.q, x.k, x.v),
    )
    yield Example(
        "gradients",
        "torch.autograd.grad(out, (q, k, v))",
        lambda x: gradients(flash_attn_func, x),
        lambda x: gradients(standard_attention, x),
    )
    yield Example(
        "causal",
        "flash_attn_func(causal=True)",
        lambda x: flash_attn_func(x.q, x.k, x.v, causal=True),
        lambda x: standard_attention(x.q, x.k, x.v, causal=True),
    )
    yield Example(
        "window",
        f"flash_attn_func(window_size={WINDOW})",
        lambda x: flash_attn_func(x.q, x.k, x.v, window_size=WINDOW),
        lambda x: standard_attention(x.q, x.k, x.v, window=WINDOW),
    )
    yield Example(
        "GQA",
        f"{HEADS} query heads, {KV_HEADS} key-value heads",
        lambda x: flash_attn_func(x.q, x.k_few, x.v_few, causal=True),
        lambda x: standard_attention(x.q, x.k_few, x.v_few, causal=True),
    )
    yield Example(
        "packed qkv",
        "flash_attn_qkvpacked_func(qkv)",
        lambda x: flash_attn_qkvpacked_func(torch.stack((x.q, x.k, x.v), dim=2), causal=True),
        lambda x: standard_attention(x.q, x.k, x.v, causal=True),
    )
    yield Example(
        "packed kv",
        "flash_attn_kvpacked_func(q, kv)",
        lambda x: flash_attn_kvpacked_func(x.q, torch.stack((x.k, x.v), dim=2)),
        lambda x: standard_attention(x.q, x.k, x.v),
    )
    yield Example(
        "varlen",
        "flash_attn_varlen_func(...)",
        varlen,
        standard_varlen,
    )
    yield Example(
        "KV cache",
        "flash_attn_with_kvcache(...)",
        kv_cache,
        lambda x: standard_attention(x.q, x.k_few, x.v_few, causal=True),
    )
