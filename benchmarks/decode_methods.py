"""One step of generation by FlashAttention-3 of two builds, FlashInfer, cuDNN and this package."""

from __future__ import annotations

import math
import random
import site
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Optional

import gpu

OURS = gpu.OURS
FA3, FA3_PLANNED, CUDNN = "FlashAttention-3", "FlashAttention-3, planned", "cuDNN"
VLLM, FLASHINFER = "vLLM's FlashAttention-3, planned", "FlashInfer, planned"
# Calls of one graph have caches of their own, of so many bytes in all: none is in L2.
ROTATING_BYTES, MAX_CALLS = 4e8, 256
PAGE_OF_FLASHINFER = 16


@dataclass(frozen=True)
class Case:
    """One step: q (batch, queries, heads, head_dim) over caches of `seqlen` keys.

    `page`: rows of a page, in random order; 0: one block of memory for each sequence. `ragged`:
    lengths drawn from 1 to seqlen, else all are seqlen. `new`: keys appended and rotated first.
    `layers`: so many calls that share lengths and positions, as in a model. `packed`: queries of
    each sequence, one behind the other in q (total, heads, head_dim), over pages; `queries` is then
    the most of any.
    """

    kind: str
    batch: int
    seqlen: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    queries: int = 1
    page: int = 0
    ragged: bool = False
    new: int = 0
    layers: int = 0
    packed: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Queries of each sequence."""
        return self.packed or (self.queries,) * self.batch

    @property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.seqlen] * self.batch
        draw = random.Random(self.batch)
        return [draw.randint(1, self.seqlen) for _ in range(self.batch)]

    @property
    def head_dims(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.head_dim, self.head_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def row_bytes(self) -> int:
        """Of a key and its value, of all heads."""
        return 2 * 2 * self.kv_heads * self.head_dim

    @property
    def bytes(self) -> int:
        """What a step must move: keys and values once, queries and results."""
        rows = sum(self.counts) * self.heads
        return sum(self.lengths) * self.row_bytes + 2 * 2 * rows * self.head_dim

    @property
    def pairs(self) -> float:
        """What a causal mask leaves; queries are the last rows of a sequence."""
        return sum(n * length - n * (n - 1) / 2 for n, length in zip(self.counts, self.lengths))

    @property
    def flops(self) -> float:
        return 4.0 * self.heads * self.pairs * self.head_dim

    @property
    def calls(self) -> int:
        """Calls of a graph."""
        if self.layers:
            return self.layers
        cache = self.batch * self.seqlen * self.row_bytes
        return max(1, min(MAX_CALLS, math.ceil(ROTATING_BYTES / cache)))


class Inputs:
    """Random tensors of one call; those of `first`, where it is given, are shared with it."""

    def __init__(
        self, case: Case, generator: Any, device: str = "cuda", first: Optional[Inputs] = None
    ) -> None:
        import torch

        def rand(*shape: int) -> Any:
            kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
            return torch.randn(shape, generator=generator, **kind)

        self.case = case
        heads = (case.kv_heads, case.head_dim)
        self.qv: Optional[Any] = None
        room = case.seqlen + (case.new and max(case.page, 64))
        rows = (sum(case.packed),) if case.packed else (case.batch, case.queries)
        self.q = rand(*rows, case.heads, case.head_dim)
        self.table: Optional[Any] = None
        if case.page:
            pages = case.batch * -(-room // case.page)
            shape: tuple[int, ...] = (pages, case.page, *heads)
            order = torch.randperm(pages, device=device, generator=generator)
            self.table = order.to(torch.int32).view(case.batch, -1)
        else:
            shape = (case.batch, room, *heads)
        self._fill_caches(rand, shape)
        self.new = {name: rand(case.batch, case.new, *heads) for name in "kv" if case.new}
        if first:
            self.lengths, self.rotary, self.packed = first.lengths, first.rotary, first.packed
            self.key_starts = first.key_starts
            return
        kind: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.lengths = torch.tensor(case.lengths, **kind)
        self.key_starts = torch.tensor([0, *accumulate(case.lengths)], **kind)
        self.packed: dict[str, Any] = {}
        if case.packed:
            starts = torch.tensor([0, *accumulate(case.packed)], **kind)
            self.packed = {"cu_seqlens_q": starts, "max_seqlen_q": case.queries}
        self.rotary: dict[str, Any] = {}
        if case.new:
            angle = torch.rand(room, case.head_dim // 2, device=device, generator=generator)
            self.rotary = {
                "rotary_cos": angle.cos().bfloat16(),
                "rotary_sin": angle.sin().bfloat16(),
            }

    def _fill_caches(self, rand: Callable[..., Any], shape: tuple[int, ...]) -> None:
        self.k, self.v = rand(*shape), rand(*shape)


def all_inputs(case: Case, device: str = "cuda", kind: type[Inputs] = Inputs) -> list[Inputs]:
    """Of all calls of a graph."""
    import torch

    generator = torch.Generator(device).manual_seed(case.batch + case.seqlen)
    first = kind(case, generator, device)
    shared = first if case.layers else None
    return [first, *(kind(case, generator, device, shared) for _ in range(case.calls - 1))]


Step = Callable[[Inputs], Any]
# What a case is measured with: the inputs of all calls of a graph, and who computes them.
Prepared = tuple[list[Inputs], dict[str, Step]]


def ours(inputs: Inputs) -> Any:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        inputs.q,
        inputs.k,
        inputs.v,
        **inputs.new,
        **inputs.rotary,
        cache_seqlens=inputs.lengths,
        block_table=inputs.table,
        causal=True,
    )


def ours_packed(inputs: Inputs) -> Any:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        inputs.q,
        inputs.k,
        inputs.v,
        **inputs.packed,
        cu_seqlens_k=inputs.key_starts,
        max_seqlen_k=inputs.case.seqlen,
        block_table=inputs.table,
        causal=True,
    )


def fa3(inputs: Inputs, plan: Optional[Any] = None) -> Any:
    import torch

    return torch.ops.flash_attn_3.fwd.default(
        inputs.q,
        inputs.k,
        inputs.v,
        **{f"{name}_new": x for name, x in inputs.new.items()},
        **inputs.rotary,
        **inputs.packed,
        q_v=inputs.qv,
        softmax_scale=inputs.case.scale,
        is_rotary_interleaved=True,
        seqused_k=inputs.lengths,
        page_table=inputs.table,
        is_causal=True,
        num_splits=0,
        scheduler_metadata=plan,
    )[0]


def sizes_of(case: Case) -> tuple[int, ...]:
    """What plans of FlashAttention-3 begin with."""
    heads = (case.heads, case.kv_heads)
    return (case.batch, case.queries, case.seqlen, *heads, *case.head_dims)


def fa3_plan(inputs: Inputs) -> Any:
    """What FlashAttention-3 computes once for all layers of a step."""
    import torch

    return torch.ops.flash_attn_3.get_scheduler_metadata.default(
        *sizes_of(inputs.case),
        torch.bfloat16,
        inputs.lengths,
        cu_seqlens_q=inputs.packed.get("cu_seqlens_q"),
        page_size=inputs.case.page or None,
        max_seqlen_k_new=inputs.case.new,
        is_causal=True,
        num_splits=0,
    )


def fa3_planned(first: Inputs) -> Step:
    """With a plan made ahead; among the calls of a model, at the first."""
    plan = fa3_plan(first)

    def step(inputs: Inputs) -> Any:
        nonlocal plan
        if inputs.case.layers and inputs is first:
            plan = fa3_plan(first)
        return fa3(inputs, plan)

    return step


def vllm_planned(first: Inputs) -> Step:
    """The extension of a wheel of vLLM, whose operators take everything by position."""
    import torch

    ops, case = torch.ops._vllm_fa3_C, first.case
    no_window = (-1, -1)
    starts, longest = (first.packed.get(name) for name in ("cu_seqlens_q", "max_seqlen_q"))
    rows = (first.lengths, starts, *[None] * 4, case.page or None, 0)
    rule = (True, *no_window, False, 0, None, 0)
    plan = ops.get_scheduler_metadata.default(*sizes_of(case), torch.bfloat16, *rows, *rule)

    def step(inputs: Inputs) -> Any:
        qkv = (inputs.q, inputs.k, inputs.v)
        lengths = (None, None, inputs.qv, None, starts, *[None] * 3, inputs.lengths, longest, None)
        rows = (*lengths, inputs.table, *[None] * 5)
        rule = (*[None] * 3, case.scale, True, *no_window, 0.0, False)
        return ops.fwd.default(*qkv, *rows, *rule, plan, 0, None, 0, None, 1, 0, None)[0]

    return step


def flashinfer_planned(first: Inputs) -> Step:
    """The caches taken as pages that stand in order; a plan reads the lengths on the host."""
    import flashinfer
    import torch

    case, page = first.case, PAGE_OF_FLASHINFER
    counts = [-(-length // page) for length in case.lengths]
    places = [
        range(i * case.seqlen // page, i * case.seqlen // page + n) for i, n in enumerate(counts)
    ]
    kind: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    starts = torch.tensor([0, *accumulate(counts)], **kind)
    pages = torch.tensor([page for row in places for page in row], **kind)
    last = torch.tensor([(length - 1) % page + 1 for length in case.lengths], **kind)
    workspace = torch.zeros(256 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=True)
    sizes = (case.heads, case.kv_heads, case.head_dim, page)
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(starts, pages, last, *sizes, **dtypes)

    def step(inputs: Inputs) -> Any:
        paged = tuple(x.unflatten(1, (-1, page)).flatten(0, 1) for x in (inputs.k, inputs.v))
        return wrapper.run(inputs.q[:, 0], paged)[:, None]

    return step


def cudnn(inputs: Inputs) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    heads_first = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)


@dataclass(frozen=True)
class Libraries:
    """Where the peers' compiled parts are; None: left out."""

    fa3: Path
    vllm: Optional[Path] = None
    flashinfer: Optional[Path] = None
    sglang: Optional[Path] = None
    flashmla: Optional[Path] = None

    def load(self) -> None:
        import torch

        for library in (self.fa3, self.vllm, self.sglang, self.flashmla):
            if library:
                torch.ops.load_library(str(library))
        if self.flashinfer:
            site.addsitedir(str(self.flashinfer))

    def prepared(self, case: Case) -> Prepared:
        inputs = all_inputs(case)
        return inputs, self.methods(inputs[0])

    def methods(self, first: Inputs) -> dict[str, Step]:
        """Those that take a case, by name."""
        case = first.case
        is_plain = case.queries == 1 and not case.page and not case.new
        mine = ours_packed if case.packed else ours
        made = {OURS: mine, FA3: fa3, FA3_PLANNED: fa3_planned(first)}
        if self.vllm and not case.new:
            made[VLLM] = vllm_planned(first)
        # Kernels of other head dims would be compiled here and now.
        if self.flashinfer and is_plain and case.head_dim == 128:
            made[FLASHINFER] = flashinfer_planned(first)
        if is_plain and not case.ragged:
            made[CUDNN] = cudnn
        return made
