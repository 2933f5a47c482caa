"""FP8 (e4m3) attention on a Hopper GPU against FlashAttention-3, in one run.

    python benchmarks/fp8.py --fa3 LIBRARY    measure; writes results/<date>-fp8-<gpu>.json

LIBRARY is FlashAttention-3's compiled extension for FP8 (`flash_ops` of a wheel of sglang-kernel).
README.md beside this file has the method.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Optional

import gpu
import report
from accuracy import distance, exact_attention, with_outliers

OURS, PEER = gpu.OURS, "FlashAttention-3"
# Of FP8, the wheel's extension is there for head dim 128 alone.
PEERS_HEAD_DIM = 128
WARM_UP_MS, TOTAL_MS = 5.0, 40.0
# Of errors: the same, a thousandth of them ten times as large.
INPUTS = ("normal", "outliers")


@dataclass(frozen=True)
class Case:
    """q, k, v of (batch, seqlen, heads, head_dim)."""

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    def flops(self) -> float:
        """Useful work; a causal mask leaves half of the products."""
        pairs = self.seqlen**2 * (0.5 if self.causal else 1.0)
        return 4 * self.batch * self.heads * pairs * self.head_dim


def cases() -> Iterator[Case]:
    """Equal tokens and width for all, then grouped heads."""
    for head_dim, causal in product((128, 64, 256), (False, True)):
        seqlens = gpu.SEQLENS if head_dim == PEERS_HEAD_DIM else (512, 1024, 4096, 16384)
        heads = gpu.HIDDEN // head_dim
        for seqlen in seqlens:
            yield Case(gpu.TOKENS // seqlen, seqlen, heads, heads, head_dim, causal)
    yield Case(2, 8192, 32, 8, 128, causal=True)


class Inputs:
    """Random normal values of a case, scaled to the range of e4m3, with the factors of that."""

    def __init__(self, case: Case, kind: str = "normal") -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(case.seqlen + case.head_dim)
        self.case, self.qkv, self.descale = case, [], []
        for heads in (case.heads, case.kv_heads, case.kv_heads):
            shape = (case.batch, case.seqlen, heads, case.head_dim)
            x = torch.randn(shape, generator=generator, device="cuda")
            if kind == "outliers":
                x = with_outliers(x, generator)
            factor = float(x.abs().max()) / 448
            self.qkv.append((x / factor).to(torch.float8_e4m3fn))
            shape_of_factors = (case.batch, case.kv_heads)
            self.descale.append(torch.full(shape_of_factors, factor, device="cuda"))


def flash_attn(inputs: Inputs) -> Any:
    """The public function."""
    from flash_attn_interface import flash_attn_func

    factors = dict(zip(("q_descale", "k_descale", "v_descale"), inputs.descale))
    return flash_attn_func(*inputs.qkv, **factors, causal=inputs.case.causal)


def flash_attention_3(inputs: Inputs) -> Any:
    """The operator of its extension."""
    import torch

    rule = (inputs.case.head_dim**-0.5, inputs.case.causal, -1, -1, 0, 0.0, False)
    rest = (None, 1, None, 0, None, None, False)
    given = (*inputs.qkv, *[None] * 17, *inputs.descale, *rule, *rest)
    return torch.ops.sgl_kernel.fwd.default(*given)[0]


def exact(inputs: Inputs) -> Any:
    """In float64, from the values that the FP8 ones stand for."""
    q, k, v = (
        x.double() * f.double()[:, None, :, None] for x, f in zip(inputs.qkv, inputs.descale)
    )
    return exact_attention(q, k, v, inputs.case.causal)


def methods_of(case: Case) -> dict[str, Callable[[Inputs], Any]]:
    """Who computes a case."""
    both = {OURS: flash_attn, PEER: flash_attention_3}
    return both if case.head_dim == PEERS_HEAD_DIM else {OURS: flash_attn}


def errors() -> Iterator[dict[str, Any]]:
    """A row for each kind of inputs and mask."""
    for kind, causal in product(INPUTS, (False, True)):
        case = Case(1, 2048, 8, 8, 128, causal)
        inputs = Inputs(case, kind)
        truth = exact(inputs)
        found = {name: distance(f(inputs), truth) for name, f in methods_of(case).items()}
        yield {"inputs": kind, **asdict(case), "error": found}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph, so that its CPU time does not count."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(case: Case, timer: gpu.Timer) -> dict[str, Any]:
    """The row of a case; RuntimeError if the methods do not agree."""
    inputs = Inputs(case)
    methods = methods_of(case)
    outs = [f(inputs).double() for f in methods.values()]
    difference = distance(outs[0], outs[-1])
    # Both round probabilities to three bits.
    if not difference <= 2 * gpu.MAX_DIFFERENCE:
        raise RuntimeError(f"{case}: the results differ by {difference:.1e} of their norm")
    calls = {name: captured(partial(f, inputs)) for name, f in methods.items()}
    draw = random.Random(0)
    orders = [draw.sample(list(calls), len(calls)) for _ in range(gpu.ROUNDS)]
    rounds = gpu.take_turns(calls, timer, orders, WARM_UP_MS, TOTAL_MS)
    ms = {name: median(times) for name, times in rounds.items()}
    tflops = {name: case.flops() / time * 1e-9 for name, time in ms.items()}
    row = {**asdict(case), "ms": ms, "tflops": tflops, "difference": difference}
    if PEER in tflops:
        row["ratio"] = tflops[OURS] / tflops[PEER]
    return row


def run(fa3: Path, out: Optional[Path]) -> Path:
    """Measures everything on the current GPU and writes the result."""
    import torch

    torch.ops.load_library(str(fa3))
    timer, rows = gpu.CudaTimer(), list(errors())
    for row in rows:
        print(row["inputs"], row["causal"], row["error"], file=sys.stderr)
    for case in cases():
        rows.append(measure(case, timer))
        told = ", ".join(f"{name} {x:.0f}" for name, x in rows[-1]["tflops"].items())
        print(f"{case.head_dim} {case.mask} {case.seqlen}: {told}", file=sys.stderr)
        torch.cuda.empty_cache()
    return report.write({**report.of_gpu("fp8"), "rows": rows}, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fa3", type=Path, required=True, help="FlashAttention-3's extension")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    print(run(arguments.fa3, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
