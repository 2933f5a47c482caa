"""Attention on a Hopper GPU against FlashAttention-3, FlashAttention-4 and cuDNN, in one run.

    python benchmarks/peers.py run --fa3 LIBRARY [--fa4 SITE]
                                                    measure; writes results/<date>-peers-<gpu>.json
    python benchmarks/peers.py plot RESULT.json     draw what was measured beside it, as a PNG

LIBRARY is FlashAttention-3's compiled extension (`flash_attn_3/_C.so` of a wheel that has one).
SITE is a folder that flash-attn-4 and what it needs were installed into.
README.md beside this file has the method.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Optional

import fa3_operators
import gpu
import report
from accuracy import distance, exact_attention
from peer_methods import FA3, KINDS, OURS, Case, Inputs, Methods, deterministic, load

SEQLENS = (512, 1024, 2048, 4096, 16384)
# Where sums of dQ of several CTAs have one order, if asked for.
HEAD_DIMS_IN_ORDER, SEQLENS_IN_ORDER = (64, 96, 128), (2048, 4096, 16384)
# Lengths whose dense cases are timed forward and backward together, too.
SEQLENS_OF_BOTH = (512, 2048, 16384)
LENGTHS = tuple(random.Random(1234 + i).randint(100, 4000) for i in range(16))
WARM_UP_MS, TOTAL_MS, TOTAL_MS_OF_BOTH, TOTAL_MS_OF_OTHERS = 20.0, 75.0, 50.0, 40.0
TENSORS = ("out", "dq", "dk", "dv")


def dense(head_dim: int, causal: bool, seqlen: int, tokens: int = gpu.TOKENS) -> Case:
    heads = gpu.HIDDEN // head_dim
    return Case("dense", tokens // seqlen, seqlen, heads, heads, head_dim, causal)


def cases() -> Iterator[Case]:
    """Equal tokens and width for all dense ones, then what else people run."""
    for head_dim, causal, seqlen in product(gpu.HEAD_DIMS, (False, True), SEQLENS):
        yield dense(head_dim, causal, seqlen)
    for head_dim, heads in ((96, 16), (192, 8)):
        yield Case("dense", 4, 4096, heads, heads, head_dim, causal=False)
    for causal in (False, True):
        yield Case("V of 128 columns", 4, 4096, 8, 8, 192, causal, head_dim_v=128)
    yield Case("fp16", 4, 4096, 16, 16, 128, causal=False, dtype="float16")
    yield Case("32 heads, 8 of K and V", 2, 8192, 32, 8, 128, causal=True)
    for head_dim in (64, 128):
        heads = gpu.HIDDEN // head_dim
        yield Case("window of 1024", 1, 16384, heads, heads, head_dim, causal=False, window=1023)
    for causal in (False, True):
        longest = max(LENGTHS)
        yield Case("packed", len(LENGTHS), longest, 16, 16, 128, causal, lengths=LENGTHS)


def passes_of(case: Case) -> Sequence[str]:
    is_dense = case.kind == "dense" and case.head_dim in gpu.HEAD_DIMS
    return gpu.PASSES if is_dense and case.seqlen in SEQLENS_OF_BOTH else gpu.PASSES[:2]


def ready(inputs: Inputs, methods: Methods) -> dict[str, Any]:
    """The methods that take a case, run once."""
    return {name: made(inputs) for name, made in methods.items() if made.takes(inputs.case)}


def two_of(methods: Methods) -> Methods:
    """Ours, and the one that errors, hard inputs and deterministic calls are judged by."""
    return {name: methods[name] for name in (OURS, FA3)}


def difference(methods: dict[str, Any]) -> float:
    """How far others are from ours: out, dq, dk, dv, the largest of all."""
    ours = methods[OURS].results()
    others = [method.results() for name, method in methods.items() if name != OURS]
    return max(distance(x, y) for results in others for x, y in zip(ours, results))


def take_turns(
    calls: dict[str, Callable[[], Any]], timer: gpu.Timer, total_ms: float
) -> dict[str, float]:
    """Milliseconds of each call; their order is drawn anew for each round."""
    draw = random.Random(0)
    orders = [draw.sample(list(calls), len(calls)) for _ in range(gpu.ROUNDS)]
    rounds = gpu.take_turns(calls, timer, orders, WARM_UP_MS, total_ms)
    return {name: median(times) for name, times in rounds.items()}


def measure(case: Case, timer: gpu.Timer, known: Methods) -> list[dict[str, Any]]:
    """A row for each pass; RuntimeError if the methods do not agree."""
    methods = ready(Inputs(case), known)
    found = difference(methods)
    if not found <= gpu.MAX_DIFFERENCE:
        raise RuntimeError(f"{case}: the results differ by {found:.1e} of their norm")
    rows = []
    for passes in passes_of(case):
        calls = {name: method.of(passes) for name, method in methods.items()}
        total_ms = TOTAL_MS_OF_BOTH if passes == "fwd+bwd" else TOTAL_MS
        ms = take_turns(calls, timer, total_ms)
        tflops = {name: case.flops(passes) / time * 1e-9 for name, time in ms.items()}
        best = max(rate for name, rate in tflops.items() if name != OURS)
        rows.append({
            **asdict(case),
            "passes": passes,
            "ms": ms,
            "tflops": tflops,
            "ratio": tflops[OURS] / best,
            "difference": found,
        })  # fmt: skip
    return rows


def exact_results(inputs: Inputs) -> list[Any]:
    """out, dq, dk, dv in float64."""
    import torch

    leaves = [x.detach().double().requires_grad_() for x in inputs.qkv]
    out = exact_attention(*leaves, inputs.case.causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.dout.double())]


def errors(inputs: Inputs, known: Methods) -> dict[str, Any]:
    """The row of how far every method is from float64."""
    exact = exact_results(inputs)
    found = {
        name: dict(zip(TENSORS, map(distance, method.results(), exact)))
        for name, method in ready(inputs, known).items()
    }
    return {**asdict(inputs.case), "inputs": inputs.kind, "error": found}


def slowed(case: Case, timer: gpu.Timer, known: Methods) -> Iterator[dict[str, Any]]:
    """A row for each kind of inputs: the time of a forward call over that of normal inputs."""
    methods = {kind: ready(Inputs(case, kind), known) for kind in KINDS}
    calls = {
        f"{kind} {name}": method.forward
        for kind, by_name in methods.items()
        for name, method in by_name.items()
    }
    ms = take_turns(calls, timer, TOTAL_MS_OF_OTHERS)
    for kind, by_name in methods.items():
        yield {
            **asdict(case),
            "inputs": kind,
            "ms": {name: ms[f"{kind} {name}"] for name in known},
            "slower": {name: ms[f"{kind} {name}"] / ms[f"normal {name}"] for name in known},
            "difference": distance(*(method.forward() for method in by_name.values())),
        }


def in_order(case: Case, timer: gpu.Timer, known: Methods) -> dict[str, Any]:
    """The row of a deterministic backward call: its time over that of others."""
    inputs = Inputs(case)
    usual = {name: made.backward for name, made in ready(inputs, known).items()}
    changed = {name: deterministic(method) for name, method in known.items()}
    calls = {f"{name} in order": made.backward for name, made in ready(inputs, changed).items()}
    ms = take_turns({**usual, **calls}, timer, TOTAL_MS_OF_OTHERS)
    slower = {name: ms[f"{name} in order"] / ms[name] for name in known}
    return {**asdict(case), "ms": ms, "slower": slower}


def cpu_times(device: str = "cuda") -> dict[str, Any]:
    """The row of what the CPU spends in a forward call whose kernels are shorter than that."""
    import torch

    from flash_attn import flash_attn_func

    qkv = [torch.randn(gpu.CPU_SHAPE, dtype=torch.bfloat16, device=device) for _ in range(3)]
    calls = {OURS: partial(flash_attn_func, *qkv), FA3: partial(fa3_operators.forward, *qkv, False)}
    rounds = gpu.cpu_turns(calls, device)
    return {"gradients": False, "us": {name: gpu.spread(times) for name, times in rounds.items()}}


def tell(case: Case, told: str) -> None:
    print(f"{case.kind} {case.head_dim} {case.mask} {case.seqlen}: {told}", file=sys.stderr)


def told_of(row: dict[str, Any], field: str) -> str:
    return f"{row['inputs']}, {field} {report.rounded(row[field])}"


def tables(methods: Methods) -> dict[str, list[dict[str, Any]]]:
    """Everything that is measured."""
    import torch

    timer, rows, accuracy, hard, ordered = gpu.CudaTimer(), [], [], [], []
    for case in cases():
        measured = measure(case, timer, methods)
        tell(case, ", ".join(f"{row['passes']} {row['ratio']:.3f}" for row in measured))
        rows += measured
        torch.cuda.empty_cache()
    for kind, head_dim, causal in product(("normal", "outliers"), gpu.HEAD_DIMS, (False, True)):
        case = dense(head_dim, causal, 1024, tokens=2048)
        accuracy.append(errors(Inputs(case, kind), two_of(methods)))
        tell(case, told_of(accuracy[-1], "error"))
    for head_dim in gpu.HEAD_DIMS:
        case = dense(head_dim, False, 4096)
        for row in slowed(case, timer, two_of(methods)):
            tell(case, told_of(row, "slower"))
            hard.append(row)
    for head_dim, causal, seqlen in product(HEAD_DIMS_IN_ORDER, (False, True), SEQLENS_IN_ORDER):
        case = dense(head_dim, causal, seqlen)
        ordered.append(in_order(case, timer, two_of(methods)))
        tell(case, f"deterministic {report.rounded(ordered[-1]['slower'])}")
    found = {"rows": rows, "accuracy": accuracy, "hard": hard, "deterministic": ordered}
    return {"cpu": [cpu_times()], **found}


def run(fa3: Path, fa4: Optional[Path], out: Optional[Path]) -> Path:
    """Measures everything on the current GPU and writes the result."""
    import torch

    measured = tables(load(fa3, fa4))
    versions = {"cuDNN": str(torch.backends.cudnn.version())}
    if fa4:
        versions.update({name: version(name) for name in ("flash-attn-4", "nvidia-cutlass-dsl")})
    return report.write({**report.of_gpu("peers", versions), **measured}, out)


def main() -> int:
    def add_options(runs: argparse.ArgumentParser) -> None:
        runs.add_argument("--fa3", type=Path, required=True, help="FlashAttention-3's extension")
        runs.add_argument("--fa4", type=Path, help="a folder that has FlashAttention-4 installed")

    def draw(result: dict[str, Any], picture: Path) -> None:
        from plot import plot_peers

        plot_peers(result, picture)

    return report.run_or_plot(__doc__ or "", add_options, lambda a: run(a.fa3, a.fa4, a.out), draw)


if __name__ == "__main__":
    sys.exit(main())
