"""Attention on this GPU against torch SDPA's flash backend, which is FlashAttention-2, in one run.

    python benchmarks/gpu.py run                 measure; writes results/<date>-<gpu>.json
    python benchmarks/gpu.py plot RESULT.json    draw what was measured beside it, as a PNG

Needs torch alone to measure, and matplotlib alone to draw, so the two can run on two machines.
README.md beside this file has the method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import report
from accuracy import distance

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
OURS, THEIRS = METHODS = ("flash_attn", "torch SDPA")
PASSES = ("fwd", "bwd", "fwd+bwd")
# A matrix product of each forward pass counts 2 FLOPs a multiplication; the backward has 5 for 2.
FLOPS_OF_PASS = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}
# Results of the two in half precision may differ by this, as a part of their norm.
MAX_DIFFERENCE = 0.02
# Each case: both methods warm up, then take turns so often, each time for a share of the time.
ROUNDS, WARM_UP_MS, TOTAL_MS, MIN_CALLS = 5, 40.0, 150.0, 3
# CPU time is taken on a call whose kernels end before the next call is launched.
CPU_SHAPE, CPU_ROUNDS, CPU_CALLS = (1, 128, 4, 128), 40, 60


@dataclass(frozen=True)
class Case:
    """q, k, v, dout of (batch, seqlen, heads, head_dim)."""

    dtype: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool

    def flops(self, passes: str) -> float:
        """Useful work; a causal mask leaves half of the products."""
        pairs = self.seqlen**2 * (0.5 if self.causal else 1.0)
        return FLOPS_OF_PASS[passes] * 4 * self.batch * self.heads * pairs * self.head_dim


def cases(dtypes: list[str]) -> Iterator[Case]:
    """Every case: the same number of tokens and the same width for all."""
    for dtype, head_dim, causal, seqlen in product(dtypes, HEAD_DIMS, (False, True), SEQLENS):
        yield Case(dtype, TOKENS // seqlen, seqlen, HIDDEN // head_dim, head_dim, causal)


class Calls:
    """The calls of one case, by method and pass, on the same random inputs."""

    def __init__(self, case: Case, device: str) -> None:
        import torch

        generator = torch.Generator(device).manual_seed(case.seqlen + case.head_dim)
        shape = (case.batch, case.seqlen, case.heads, case.head_dim)
        kind = {"dtype": getattr(torch, case.dtype), "device": device}
        made = [torch.randn(shape, generator=generator, **kind) for _ in range(4)]
        self.inputs, self.dout = [x.requires_grad_() for x in made[:3]], made[3]
        self.is_causal = case.causal
        self.outs = {method: self.attention(method) for method in METHODS}

    def attention(self, method: str) -> Any:
        import torch.nn.functional as F

        from flash_attn import flash_attn_func

        if method == OURS:
            return flash_attn_func(*self.inputs, causal=self.is_causal)
        heads_first = [x.transpose(1, 2) for x in self.inputs]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=self.is_causal)
        return out.transpose(1, 2)

    def gradients(self, method: str) -> Any:
        import torch

        return torch.autograd.grad(self.outs[method], self.inputs, self.dout, retain_graph=True)

    def of(self, passes: str, method: str) -> Callable[[], Any]:
        import torch

        def forward() -> Any:
            with torch.no_grad():
                return self.attention(method)

        def both() -> Any:
            return torch.autograd.grad(self.attention(method), self.inputs, self.dout)

        return {"fwd": forward, "bwd": lambda: self.gradients(method), "fwd+bwd": both}[passes]

    def difference(self) -> float:
        """How far the methods are from each other: out, dq, dk, dv, the largest of all."""
        ours, theirs = ((self.outs[m].detach(), *self.gradients(m)) for m in METHODS)
        return max(map(distance, ours, theirs))


class CudaTimer:
    """Milliseconds of calls on the GPU, each on an L2 cache that holds nothing of the inputs."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], Any], count: int) -> list[float]:
        events = [[self._cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        self._cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


Timer = Callable[[Callable[[], Any], int], "list[float]"]


def take_turns(
    calls: dict[str, Callable[[], Any]],
    timer: Timer,
    orders: Iterable[Sequence[str]] | None = None,
    warm_up_ms: float = WARM_UP_MS,
    total_ms: float = TOTAL_MS,
) -> dict[str, list[float]]:
    """The median of each round, in milliseconds, by method.

    The methods alternate, and which of them is first does too, so that clocks and temperature
    weigh on both alike. `orders`: the methods of each of the ROUNDS rounds, instead of that.
    """
    counts = {}
    for method, call in calls.items():
        call()
        estimate = max(median(timer(call, MIN_CALLS)), 1e-3)
        timer(call, int(warm_up_ms / estimate) + 1)
        counts[method] = max(MIN_CALLS, int(total_ms / ROUNDS / estimate))
    rounds: dict[str, list[float]] = {method: [] for method in calls}
    for order in orders or [list(calls)[:: 1 - turn % 2 * 2] for turn in range(ROUNDS)]:
        for method in order:
            rounds[method].append(median(timer(calls[method], counts[method])))
    return rounds


def ratio_of(rounds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as fast as SDPA: the median over rounds, the smallest, the largest."""
    ratios = [theirs / ours for ours, theirs in zip(rounds[OURS], rounds[THEIRS])]
    return spread(ratios)


def measure(
    case: Case,
    timer: Timer,
    device: str = "cuda",
    passes: Sequence[str] = PASSES,
    warm_up_ms: float = WARM_UP_MS,
    total_ms: float = TOTAL_MS,
    make: Callable[[Case, str], Calls] = Calls,
) -> list[dict[str, Any]]:
    """A row for each of `passes`; RuntimeError if the two methods do not agree."""
    calls = make(case, device)
    difference = calls.difference()
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(f"{case}: the results differ by {difference:.1e} of their norm")
    rows = []
    for done in passes:
        turns = {method: calls.of(done, method) for method in METHODS}
        rounds = take_turns(turns, timer, warm_up_ms=warm_up_ms, total_ms=total_ms)
        rows.append({
            **asdict(case),
            "passes": done,
            "ms": {method: median(times) for method, times in rounds.items()},
            "tflops": {m: case.flops(done) / median(t) * 1e-9 for m, t in rounds.items()},
            "ratio": ratio_of(rounds),
            "difference": difference,
        })  # fmt: skip
    return rows


def cpu_turns(calls: dict[str, Callable[[], Any]], device: str = "cuda") -> dict[str, list[float]]:
    """Microseconds that the CPU spends in each call: one number a round, by method."""
    import time

    import torch

    rounds: dict[str, list[float]] = {method: [] for method in calls}
    for turn, method in product(range(CPU_ROUNDS), calls):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CPU_CALLS):
            calls[method]()
        spent = time.perf_counter() - start
        if turn > 0:  # the first one loads and compiles
            rounds[method].append(spent / CPU_CALLS * 1e6)
    return rounds


def cpu_times(device: str = "cuda") -> list[dict[str, Any]]:
    """Microseconds that the CPU spends in one forward call, without and with gradients to come."""
    import torch

    calls = Calls(Case("bfloat16", *CPU_SHAPE, causal=False), device)
    # SDPA is given its own layout, so that only the call itself counts.
    views = [x.transpose(1, 2) for x in calls.inputs]
    run = {
        OURS: lambda: calls.attention(OURS),
        THEIRS: lambda: torch.nn.functional.scaled_dot_product_attention(*views),
    }
    rows = []
    for needs_grad in (False, True):
        with torch.set_grad_enabled(needs_grad):
            rounds = cpu_turns(run, device)
        rows.append({
            "gradients": needs_grad,
            "us": {method: spread(times) for method, times in rounds.items()},
            "ratio": ratio_of(rounds),
        })  # fmt: skip
    return rows


def spread(times: list[float]) -> dict[str, float]:
    return {"median": median(times), "min": min(times), "max": max(times)}


def run(dtypes: list[str], out: Path | None) -> Path:
    """Measures everything on the current GPU and writes the result."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        cpu = cpu_times()
        rows = rows_of(cases(dtypes))
    return report.write({**report.of_gpu("gpu"), "cpu": cpu, "rows": rows}, out)


def rows_of(
    cases: Iterable[Case], make: Callable[[Case, str], Calls] = Calls
) -> list[dict[str, Any]]:
    """What `measure` has of each case, told as it comes."""
    import torch

    timer, rows = CudaTimer(), []
    for case in cases:
        rows += measure(case, timer, make=make)
        told = ", ".join(f"{row['passes']} {row['ratio']['median']:.2f}" for row in rows[-3:])
        mask = "causal" if case.causal else "full"
        print(f"{case.dtype} {case.head_dim} {mask} {case.seqlen}: {told}", file=sys.stderr)
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    def add_options(runs: argparse.ArgumentParser) -> None:
        choices = ("bfloat16", "float16")
        runs.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=choices)

    def draw(result: dict[str, Any], picture: Path) -> None:
        from plot import plot_ratios

        plot_ratios(result, picture)

    return report.run_or_plot(__doc__ or "", add_options, lambda a: run(a.dtypes, a.out), draw)


if __name__ == "__main__":
    sys.exit(main())
