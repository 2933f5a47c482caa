"""Decoding on a Hopper GPU against FlashAttention-3 and cuDNN, and against the speed of memory.

    python benchmarks/decode.py run --fa3 LIBRARY    measure; writes a JSON file
    python benchmarks/decode.py run --fa3 LIBRARY --quick        fewer cases, less than a minute

LIBRARY is FlashAttention-3's compiled extension (`flash_attn_3/_C.so` of a wheel that has one).
README.md beside this file has the method.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Optional

import gpu

OURS = gpu.OURS
FA3, FA3_PLANNED, CUDNN = "FlashAttention-3", "FlashAttention-3, planned", "cuDNN"
BATCHES, SEQLENS = (1, 16, 64, 128), (1024, 8192, 32768)
# Calls of one graph have caches of their own, of so many bytes in all: none is in L2.
ROTATING_BYTES, MAX_CALLS = 4e8, 64
ROUNDS, REPLAYS = 5, 8


@dataclass(frozen=True)
class Case:
    """One step: q (batch, queries, heads, head_dim) over caches of `seqlen` keys.

    `page`: rows of a page, in random order; 0: one block of memory for each sequence. `ragged`:
    lengths drawn from 1 to seqlen, else all are seqlen. `new`: keys appended and rotated first.
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

    @property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.seqlen] * self.batch
        draw = random.Random(self.batch)
        return [draw.randint(1, self.seqlen) for _ in range(self.batch)]

    @property
    def row_bytes(self) -> int:
        """Of a key and its value, of all heads."""
        return 2 * 2 * self.kv_heads * self.head_dim

    @property
    def bytes(self) -> int:
        """What a step must move: keys and values once, queries and results."""
        rows = self.batch * self.queries * self.heads
        return sum(self.lengths) * self.row_bytes + 2 * 2 * rows * self.head_dim

    @property
    def calls(self) -> int:
        """Calls of a graph."""
        cache = self.batch * self.seqlen * self.row_bytes
        return max(1, min(MAX_CALLS, math.ceil(ROTATING_BYTES / cache)))


def cases(quick: bool) -> Iterator[Case]:
    """Batches and lengths, then one thing changed at a time."""
    for batch, seqlen in product(BATCHES, SEQLENS):
        if not quick or batch * seqlen <= 64 * 8192:
            yield Case("heads 32 of 8", batch, seqlen)
    for kind, heads, kv_heads, head_dim in (
        ("head dim 64", 32, 8, 64),
        ("head dim 256", 16, 4, 256),
        ("MHA", 16, 16, 128),
        ("MQA", 16, 1, 128),
    ):
        for batch, seqlen in ((1, 8192), (16, 8192)) if not quick else ((16, 8192),):
            yield Case(kind, batch, seqlen, heads, kv_heads, head_dim)
    yield Case("ragged", 64, 8192, ragged=True)
    for page in (1, 16, 64, 256):
        yield Case(f"pages of {page}", 16, 8192, page=page)
    yield Case("ragged, pages of 16", 64, 8192, page=16, ragged=True)
    yield Case("4 queries", 16, 8192, queries=4)
    yield Case("append and rotate", 16, 8192, new=1)
    yield Case("append and rotate", 1, 1024, new=1)


class Inputs:
    """Random tensors of one call."""

    def __init__(self, case: Case, generator: Any) -> None:
        import torch

        def rand(*shape: int) -> Any:
            kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
            return torch.randn(shape, generator=generator, **kind)

        self.case = case
        heads = (case.kv_heads, case.head_dim)
        room = case.seqlen + (case.new and max(case.page, 64))
        self.q = rand(case.batch, case.queries, case.heads, case.head_dim)
        self.table: Optional[Any] = None
        if case.page:
            pages = case.batch * room // case.page
            shape: tuple[int, ...] = (pages, case.page, *heads)
            order = torch.randperm(pages, device="cuda", generator=generator)
            self.table = order.to(torch.int32).view(case.batch, -1)
        else:
            shape = (case.batch, room, *heads)
        self.k, self.v = rand(*shape), rand(*shape)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
        self.new: dict[str, Any] = {}
        if case.new:
            angle = torch.rand(room, case.head_dim // 2, device="cuda", generator=generator)
            self.new = {"k": rand(case.batch, case.new, *heads)}
            self.new["v"] = rand(case.batch, case.new, *heads)
            self.new["cos"], self.new["sin"] = (f(angle).bfloat16() for f in (torch.cos, torch.sin))


def ours(inputs: Inputs) -> Any:
    from flash_attn import flash_attn_with_kvcache

    new = inputs.new
    return flash_attn_with_kvcache(
        inputs.q,
        inputs.k,
        inputs.v,
        k=new.get("k"),
        v=new.get("v"),
        rotary_cos=new.get("cos"),
        rotary_sin=new.get("sin"),
        cache_seqlens=inputs.lengths,
        block_table=inputs.table,
        causal=True,
    )


def fa3(inputs: Inputs, plan: Optional[Any] = None) -> Any:
    import torch

    new = inputs.new
    return torch.ops.flash_attn_3.fwd.default(
        inputs.q,
        inputs.k,
        inputs.v,
        k_new=new.get("k"),
        v_new=new.get("v"),
        rotary_cos=new.get("cos"),
        rotary_sin=new.get("sin"),
        is_rotary_interleaved=True,
        seqused_k=inputs.lengths,
        page_table=inputs.table,
        is_causal=True,
        num_splits=0,
        scheduler_metadata=plan,
    )[0]


def fa3_plan(inputs: Inputs) -> Any:
    """What FlashAttention-3 computes once for all layers of a step."""
    import torch

    case = inputs.case
    head_dims = (case.head_dim, case.head_dim)
    sizes = (case.batch, case.queries, case.seqlen, case.heads, case.kv_heads, *head_dims)
    return torch.ops.flash_attn_3.get_scheduler_metadata.default(
        *sizes,
        torch.bfloat16,
        inputs.lengths,
        page_size=case.page or None,
        max_seqlen_k_new=case.new,
        is_causal=True,
        num_splits=0,
    )


def cudnn(inputs: Inputs) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    heads_first = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)


def methods_of(case: Case, first: Inputs) -> dict[str, Callable[[Inputs], Any]]:
    """Those that take a case; cuDNN's takes full caches of one query alone."""
    plan = fa3_plan(first)
    made: dict[str, Callable[[Inputs], Any]] = {
        OURS: ours,
        FA3: fa3,
        FA3_PLANNED: lambda inputs: fa3(inputs, plan),
    }
    if case.queries == 1 and not case.page and not case.ragged and not case.new:
        made[CUDNN] = cudnn
    return made


class Graph:
    """One call for each of some inputs, captured."""

    def __init__(self, method: Callable[[Inputs], Any], inputs: list[Inputs]) -> None:
        import torch

        self._cuda = torch.cuda
        self._used = method, inputs  # the graph reads their memory, a plan's too
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.out = method(inputs[0])
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for one in inputs:
                method(one)
        self._calls = len(inputs)
        self._graph.replay()

    def microseconds(self) -> float:
        """Of one call: the median of some replays."""
        events = [[self._cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
        for start, end in events:
            start.record()
            self._graph.replay()
            end.record()
        self._cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in events) / self._calls * 1e3


def captured(methods: dict[str, Callable[[Inputs], Any]], inputs: list[Inputs]) -> dict[str, Graph]:
    """The graphs of those methods that run; without ours there is nothing to compare."""
    graphs = {}
    for name, method in methods.items():
        try:
            graphs[name] = Graph(method, inputs)
        except (RuntimeError, TypeError) as error:
            if name == OURS:
                raise
            print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
    return graphs


def measure(case: Case, ceiling: float) -> dict[str, Any]:
    """The row of a case; RuntimeError if the methods do not agree."""
    import torch

    generator = torch.Generator("cuda").manual_seed(case.batch + case.seqlen)
    inputs = [Inputs(case, generator) for _ in range(case.calls)]
    graphs = captured(methods_of(case, inputs[0]), inputs)
    exact = graphs[OURS].out.double()
    found = max(
        ((graph.out.double() - exact).norm() / exact.norm()).item() for graph in graphs.values()
    )
    if not found <= gpu.MAX_DIFFERENCE:
        raise RuntimeError(f"{case}: the results differ by {found:.1e} of their norm")
    rounds: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(ROUNDS):
        for name in list(graphs)[:: 1 - turn % 2 * 2]:
            rounds[name].append(graphs[name].microseconds())
    us = {name: median(times) for name, times in rounds.items()}
    return {
        **asdict(case),
        "us": us,
        "gbps": {name: case.bytes / time * 1e-3 for name, time in us.items()},
        "of_ceiling": case.bytes / us[OURS] * 1e-3 / ceiling,
        "ratio": min((us[name] for name in us if name != OURS), default=math.nan) / us[OURS],
        "difference": found,
    }


def read_ceiling() -> float:
    """GB/s of a kernel that reads 2 GB and adds them up."""
    import torch
    from read_kernel import BLOCK, add_up

    x = torch.randint(0, 100, (2**29,), device="cuda", dtype=torch.int32)
    out = torch.empty(len(x) // BLOCK, device="cuda", dtype=torch.int64)
    times = gpu.CudaTimer()(lambda: add_up[(len(out),)](x, out, BLOCK, num_warps=8), 40)
    return 4 * len(x) / median(times) * 1e-6


def rows_of(cases: Iterator[Case], ceiling: float) -> Iterator[dict[str, Any]]:
    """Rows, up to a case that fails: an error of the device leaves nothing that runs behind it."""
    import torch

    for case in cases:
        name = f"{case.kind} {case.batch} x {case.seqlen}"
        try:
            row = measure(case, ceiling)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return
        told = f"{row['us'][OURS]:.1f} us, {row['of_ceiling']:.3f} of the ceiling"
        print(f"{name}: {told}, {row['ratio']:.2f} times the best peer", file=sys.stderr)
        yield row
        torch.cuda.empty_cache()


def run(fa3_library: Path, out: Optional[Path], quick: bool) -> Path:
    """Measures everything on the current GPU and writes the result."""
    import torch

    torch.ops.load_library(str(fa3_library))
    ceiling = read_ceiling()
    rows = list(rows_of(cases(quick), ceiling))
    machine = gpu.machine()
    machine["versions"]["cuDNN"] = str(torch.backends.cudnn.version())
    result = {**machine, "kind": "decode", "read_gbps": ceiling, "rows": rows}
    name = f"{result['date']}-decode-{gpu.slug(result['device'])}.json"
    return gpu.write(result, out or gpu.RESULTS / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure this GPU")
    runs.add_argument("--fa3", type=Path, required=True, help="FlashAttention-3's extension")
    runs.add_argument("--out", type=Path, help="the JSON file to write")
    runs.add_argument("--quick", action="store_true", help="fewer cases")
    arguments = parser.parse_args()
    print(run(arguments.fa3, arguments.out, arguments.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
