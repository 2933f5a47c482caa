"""Decoding on a Hopper GPU against others' kernels, and against the speed of memory.

    python benchmarks/decode.py run --fa3 LIBRARY    measure; writes a JSON file
    python benchmarks/decode.py run --fa3 LIBRARY --quick        fewer cases, less than a minute
    python benchmarks/decode.py run --fa3 LIBRARY --only latent  one table of all

LIBRARY is FlashAttention-3's compiled extension (`flash_attn_3/_C.so` of a wheel that has one).
`--vllm LIBRARY` is that of a wheel of vLLM (`_vllm_fa3_C.abi3.so`), `--flashinfer SITE` a folder
that FlashInfer was installed into. Of latent attention alone, `--sglang LIBRARY` and
`--flashmla LIBRARY` are those of a wheel of sglang-kernel (`flash_ops.abi3.so` and
`flashmla_ops.abi3.so`). README.md beside this file has the method.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Optional

import gpu
import latent_methods
import report
from accuracy import distance
from decode_methods import OURS, Case, Inputs, Libraries, Prepared, Step

BATCHES, SEQLENS = (1, 16, 64, 128), (1024, 8192, 32768)
ROUNDS, REPLAYS = 5, 8
TABLES = ("rows", "chunks", "mixed", "layers", "latent")
Prepare = Callable[[Case], Prepared]


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
        for batch in (1, 16):
            yield Case(kind, batch, 8192, heads, kv_heads, head_dim)
    # What one of eight GPUs has of a model with 64 heads, 8 of keys.
    for batch in (1, 4, 16, 64):
        yield Case("heads 8 of 1", batch, 8192, 8, 1)
    yield Case("heads 8 of 1, ragged", 16, 8192, 8, 1, ragged=True)
    yield Case("ragged", 64, 8192, ragged=True)
    for page in (1, 16, 64, 256):
        yield Case(f"pages of {page}", 16, 8192, page=page)
    yield Case("ragged, pages of 16", 64, 8192, page=16, ragged=True)
    yield Case("ragged, 16 queries", 64, 8192, queries=16, ragged=True)
    yield Case("4 queries", 16, 8192, queries=4)
    for kind, heads, kv_heads, queries in (("16 queries", 64, 8, 16), ("8 queries", 28, 4, 8)):
        for batch in (1, 16):
            yield Case(
                f"{kind}, heads {heads} of {kv_heads}", batch, 8192, heads, kv_heads, 128, queries
            )
    yield Case("append and rotate", 16, 8192, new=1)
    yield Case("append and rotate", 1, 1024, new=1)


def chunks() -> Iterator[Case]:
    """Pieces of a long prompt, as servers take them: more rows than a step, and few tiles."""
    for heads, kv_heads, head_dim, queries in (
        (32, 8, 128, 256),
        (8, 1, 128, 512),
        (40, 8, 128, 512),
        (8, 8, 64, 512),
        (8, 4, 256, 512),
    ):
        for seqlen in (8192, 32768):
            yield Case("chunk", 1, seqlen, heads, kv_heads, head_dim, queries)
    yield Case("chunk", 1, 8192, queries=256, page=64)


def mixed() -> Iterator[Case]:
    """What a server with chunked prefill sends: steps, and chunks of prompts among them."""
    for kind, packed, heads in (
        ("31 of 1 query, 1 of 512", (*[1] * 31, 512), ((32, 8), (28, 4), (64, 8))),
        ("60 of 1 query, 4 of 300", (*[1] * 60, *[300] * 4), ((32, 8), (28, 4), (64, 8))),
        ("16 of 20 to 200 queries", tuple(range(20, 201, 12)), ((32, 8), (64, 8))),
        ("64 of 1 to 8 queries", (*range(1, 9),) * 8, ((32, 8),)),
    ):
        for pair in heads:
            sizes = (len(packed), 4000, *pair, 128, max(packed))
            yield Case(kind, *sizes, page=64, packed=packed)


def models() -> Iterator[Case]:
    """All attention of a step: a key appended and rotated in each layer's cache, then read."""
    for batch in (1, 16):
        yield Case("32 layers", batch, 4096, new=1, layers=32)


class Graph:
    """One call for each of some inputs, captured."""

    def __init__(self, method: Step, inputs: list[Inputs]) -> None:
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


def captured(methods: dict[str, Step], inputs: list[Inputs]) -> dict[str, Graph]:
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


def times_of(graphs: dict[str, Graph]) -> dict[str, float]:
    """Microseconds of a call by each method, which take turns."""
    rounds: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(ROUNDS):
        for name in list(graphs)[:: 1 - turn % 2 * 2]:
            rounds[name].append(graphs[name].microseconds())
    return {name: median(times) for name, times in rounds.items()}


def measure(case: Case, prepare: Prepare, ceiling: float) -> dict[str, Any]:
    """The row of a case; RuntimeError if the methods do not agree."""
    inputs, methods = prepare(case)
    graphs = captured(methods, inputs)
    found = max(distance(graph.out, graphs[OURS].out) for graph in graphs.values())
    if not found <= gpu.MAX_DIFFERENCE:
        raise RuntimeError(f"{case}: the results differ by {found:.1e} of their norm")
    us = times_of(graphs)
    row = {
        **asdict(case),
        "us": us,
        "gbps": {name: case.bytes / time * 1e-3 for name, time in us.items()},
        "tflops": {name: case.flops / time * 1e-6 for name, time in us.items()},
        "of_ceiling": case.bytes / us[OURS] * 1e-3 / ceiling,
        "ratio": min((us[name] for name in us if name != OURS), default=math.nan) / us[OURS],
        "difference": found,
    }
    if case.layers:
        calls = {name: partial(methods[name], inputs[-1]) for name in graphs}
        row["cpu_us"] = {name: median(times) for name, times in gpu.cpu_turns(calls).items()}
    return row


def read_ceiling() -> float:
    """GB/s of a kernel that reads 2 GB and adds them up."""
    import torch
    from read_kernel import BLOCK, add_up

    x = torch.randint(0, 100, (2**29,), device="cuda", dtype=torch.int32)
    out = torch.empty(len(x) // BLOCK, device="cuda", dtype=torch.int64)
    times = gpu.CudaTimer()(lambda: add_up[(len(out),)](x, out, BLOCK, num_warps=8), 40)
    return 4 * len(x) / median(times) * 1e-6


def rows_of(cases: Iterable[Case], prepare: Prepare, ceiling: float) -> Iterator[dict[str, Any]]:
    """Rows, up to a case that fails: an error of the device leaves nothing that runs behind it."""
    import torch

    for case in cases:
        name = f"{case.kind} {case.batch} x {case.seqlen}"
        try:
            row = measure(case, prepare, ceiling)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return
        told = f"{row['us'][OURS]:.1f} us, {row['of_ceiling']:.3f} of the ceiling"
        print(f"{name}: {told}, {row['ratio']:.2f} times the best peer", file=sys.stderr)
        yield row
        torch.cuda.empty_cache()


def run(libraries: Libraries, out: Optional[Path], quick: bool, only: str = "") -> Path:
    """Measures everything, or the one table, on the current GPU and writes the result."""
    import torch

    libraries.load()
    ceiling = read_ceiling()
    latent = partial(latent_methods.prepared, libraries)
    makers: dict[str, tuple[Iterable[Case], Prepare]] = {
        "rows": (cases(quick), libraries.prepared),
        "chunks": (chunks(), libraries.prepared),
        "mixed": (mixed(), libraries.prepared),
        "layers": (models(), libraries.prepared),
        "latent": (latent_methods.cases(), latent),
    }
    wanted = [only] if only else TABLES
    tables = {name: list(rows_of(*makers[name], ceiling)) for name in wanted}
    versions = {"cuDNN": str(torch.backends.cudnn.version())}
    if libraries.flashinfer:
        versions["FlashInfer"] = version("flashinfer-python")
    machine = report.of_gpu("decode", versions)
    return report.write({**machine, "read_gbps": ceiling, **tables}, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure this GPU")
    runs.add_argument("--fa3", type=Path, required=True, help="FlashAttention-3's extension")
    runs.add_argument("--vllm", type=Path, help="vLLM's extension of FlashAttention-3")
    runs.add_argument("--flashinfer", type=Path, help="a folder that has FlashInfer installed")
    runs.add_argument("--sglang", type=Path, help="sglang's extension of FlashAttention-3")
    runs.add_argument("--flashmla", type=Path, help="sglang's extension of FlashMLA")
    runs.add_argument("--out", type=Path, help="the JSON file to write")
    runs.add_argument("--quick", action="store_true", help="fewer cases")
    runs.add_argument("--only", choices=TABLES, default="", help="one table of the result")
    given = parser.parse_args()
    paths = (given.fa3, given.vllm, given.flashinfer, given.sglang, given.flashmla)
    print(run(Libraries(*paths), given.out, given.quick, given.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
