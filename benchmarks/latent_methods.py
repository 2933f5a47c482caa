"""The absorbed form of multi-head latent attention, as servers of DeepSeek's models call it.

A head's query is 512 values against the latent, which is key and value of all heads, and 64 rotated
ones against the rotated part of the key. Both parts of a key stand in one row of the cache, and
both parts of a query in one row of q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from decode_methods import (
    FA3,
    FA3_PLANNED,
    OURS,
    VLLM,
    Case,
    Inputs,
    Libraries,
    Prepared,
    Step,
    all_inputs,
    fa3,
    fa3_planned,
    sizes_of,
    vllm_planned,
)

SGLANG, FLASHMLA = "sglang's FlashAttention-3, planned", "FlashMLA, planned"
LATENT, ROPE = 512, 64
# Of a head before the latent absorbed its projection: the scale is of that size.
NOPE = 128
PAGE_OF_FLASHMLA = 64
# Its default. Over pages of 64 that build takes 15 to 25 times as long as others, above 64 rows.
PAGE_OF_SGLANG = 1


@dataclass(frozen=True)
class LatentCase(Case):
    """A step over pages of latents and rotated keys, which all heads share."""

    kv_heads: int = 1
    head_dim: int = LATENT + ROPE
    page: int = 64

    @property
    def head_dims(self) -> tuple[int, int]:
        return ROPE, LATENT

    @property
    def scale(self) -> float:
        return (NOPE + ROPE) ** -0.5

    @property
    def row_bytes(self) -> int:
        return 2 * self.head_dim

    @property
    def bytes(self) -> int:
        """Latents and rotated keys, once."""
        return sum(self.lengths) * self.row_bytes

    @property
    def flops(self) -> float:
        return 2.0 * self.heads * self.pairs * (self.head_dim + LATENT)


def cases() -> Iterator[LatentCase]:
    """All heads of a model or an eighth of them, then one thing changed at a time."""
    sizes = ((1, 1024), (1, 32768), (16, 8192), (64, 8192), (128, 1024))
    for heads, (batch, seqlen) in product((16, 128), sizes):
        yield LatentCase("1 query", batch, seqlen, heads)
    for heads, queries in ((16, 4), (128, 2)):
        yield LatentCase(f"{queries} queries", 64, 4096, heads, queries=queries)
    yield LatentCase("ragged", 64, 8192, 128, ragged=True)
    for heads in (16, 128):
        yield LatentCase("pages of 1", 64, 8192, heads, page=1)
    yield LatentCase("512 queries", 1, 8192, 16, queries=512)


class Latents(Inputs):
    """q and k are the rotated parts, qv and v the others: views of `whole_q` and of `cache`."""

    def _fill_caches(self, rand: Callable[..., Any], shape: tuple[int, ...]) -> None:
        self.whole_q, self.cache = self.q, rand(*shape)
        self.qv, self.q = self.whole_q.split((LATENT, ROPE), -1)
        self.v, self.k = self.cache.split((LATENT, ROPE), -1)


def ours(inputs: Inputs) -> Any:
    """What `flash_attn_interface.flash_attn_with_kvcache` calls.

    That module registers operators of FlashAttention-3's names, which its extension has here.
    """
    from flash_attn._kvcache import with_kvcache

    return with_kvcache(
        "latent attention",
        inputs.q,
        inputs.k,
        inputs.v,
        qv=inputs.qv,
        cache_seqlens=inputs.lengths,
        block_table=inputs.table,
        softmax_scale=inputs.case.scale,
        causal=True,
    )[0]


def sglang_planned(first: Inputs) -> Step:
    """The extension of a wheel of sglang-kernel, whose operators take everything by position."""
    import torch

    ops, case = torch.ops.sgl_kernel, first.case
    rows = (first.lengths, *[None] * 5, case.page)
    plan = ops.get_scheduler_metadata.default(
        *sizes_of(case), torch.bfloat16, *rows, is_causal=True
    )

    def step(inputs: Inputs) -> Any:
        qkv = (inputs.q, inputs.k, inputs.v, None, None, inputs.qv)
        rows = (*[None] * 5, inputs.lengths, None, None, inputs.table, *[None] * 8)
        rule = (case.scale, True, -1, -1, 0, 0.0, False)
        return ops.fwd.default(*qkv, *rows, *rule, plan, 0, None, 0, None, None, False)[0]

    return step


def flashmla_planned(first: Any) -> Step:
    """FlashMLA in that wheel; it takes q and the cache whole."""
    import torch

    def call(inputs: Any, *plan: Any) -> Any:
        return torch.ops.sgl_kernel.dense_decode_fwd.default(
            inputs.whole_q,
            inputs.cache,
            LATENT,
            inputs.lengths,
            inputs.table,
            inputs.case.scale,
            True,
            *plan,
        )

    plan = call(first, None, None)[2:]
    return lambda inputs: call(inputs, *plan)[0]


def methods_of(libraries: Libraries, first: Inputs) -> dict[str, Step]:
    """Those that take a case, by name."""
    made: dict[str, Step] = {OURS: ours, FA3: fa3, FA3_PLANNED: fa3_planned(first)}
    if libraries.vllm:
        made[VLLM] = vllm_planned(first)
    if libraries.sglang and first.case.page == PAGE_OF_SGLANG:
        made[SGLANG] = sglang_planned(first)
    if libraries.flashmla and first.case.page == PAGE_OF_FLASHMLA:
        made[FLASHMLA] = flashmla_planned(first)
    return made


def prepared(libraries: Libraries, case: Case) -> Prepared:
    inputs = all_inputs(case, kind=Latents)
    return inputs, methods_of(libraries, inputs[0])
