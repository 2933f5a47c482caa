"""The Triton kernels on this GPU, in one run: attention against torch SDPA's flash backend, the
operations beside it against torch, eager and compiled.

    python benchmarks/triton_backend.py [--out RESULT.json]

Writes results/<date>-triton-<gpu>.json. README.md beside this file has the method.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Optional

import gpu
import report
from accuracy import distance

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIMS, SEQLENS = (64, 128), (1024, 2048, 4096, 8192, 16384)
PASSES = ("fwd", "bwd")
OURS, COMPILED, EAGER = METHODS = ("flash_attn", "torch.compile", "torch")
# Elements of x in an operation: some hundred MB, so that no cache holds them.
ROTARY_SHAPE = (4, 4096, 32, 128)
LOGITS_SHAPE = (8192, 50304)
NORM_SHAPE = (16384, 4096)
TIMING = {"warm_up_ms": 10.0, "total_ms": 40.0}


def cases() -> Iterator[gpu.Case]:
    for head_dim, causal, seqlen in product(HEAD_DIMS, (False, True), SEQLENS):
        batch, heads = gpu.TOKENS // seqlen, gpu.HIDDEN // head_dim
        yield gpu.Case("bfloat16", batch, seqlen, heads, head_dim, causal)


@dataclass
class Operation:
    """A function by each method, on the same inputs; `leaves` are those with gradients."""

    name: str
    functions: dict[str, Callable[[], Any]]
    leaves: list[Tensor]
    # Tensors of x's size that a pass must read or write at least once, whatever computes it.
    moved: dict[str, int]

    def outs(self, method: str) -> list[Tensor]:
        result = self.functions[method]()
        return list(result) if isinstance(result, tuple) else [result]

    def gbytes(self, passes: str) -> float:
        x = self.leaves[0]
        return self.moved[passes] * x.numel() * x.element_size() * 1e-9


def operations(device: str) -> Iterator[Operation]:
    import torch
    import torch.nn.functional as F

    from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_torch
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        kind = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        return torch.randn(shape, **kind).requires_grad_()

    def operation(
        name: str,
        ours: Callable[..., Any],
        theirs: Callable[..., Any],
        inputs: list[Any],
        fwd: int,
        bwd: int,
    ) -> Operation:
        by_method = {OURS: ours, COMPILED: torch.compile(theirs, fullgraph=True), EAGER: theirs}
        functions = {m: lambda f=f: f(*inputs) for m, f in by_method.items()}
        leaves = [x for x in inputs if x.requires_grad]
        return Operation(name, functions, leaves, {"fwd": fwd, "bwd": bwd})

    table = (ROTARY_SHAPE[1], ROTARY_SHAPE[3] // 2)
    x, cos, sin = normal(*ROTARY_SHAPE), normal(*table).detach(), normal(*table).detach()
    for interleaved in (False, True):
        yield operation(
            "rotary, interleaved" if interleaved else "rotary",
            partial(apply_rotary_emb, interleaved=interleaved),
            partial(apply_rotary_emb_torch, interleaved=interleaved),
            [x, cos, sin],
            fwd=2,
            bwd=2,
        )
    logits = normal(*LOGITS_SHAPE)
    labels = torch.randint(LOGITS_SHAPE[1], LOGITS_SHAPE[:1], generator=generator, device=device)
    yield operation(
        "cross entropy",
        lambda x, labels: cross_entropy_loss(x, labels)[0],
        lambda x, labels: F.cross_entropy(x, labels, reduction="none"),
        [logits, labels],
        fwd=1,
        bwd=2,
    )
    n = NORM_SHAPE[1]
    x, residual, w, b = normal(*NORM_SHAPE), normal(*NORM_SHAPE), normal(n), normal(n)
    yield operation(
        "layer norm",
        lambda x, w, b: layer_norm_fn(x, w, b, eps=1e-5),
        lambda x, w, b: F.layer_norm(x, (n,), w, b, 1e-5),
        [x, w, b],
        fwd=2,
        bwd=3,
    )

    def add_and_norm(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = x + residual
        return F.rms_norm(z, (n,), w, 1e-5), z

    yield operation(
        "RMS norm behind a residual",
        lambda x, residual, w: rms_norm_fn(x, w, None, residual, eps=1e-5, prenorm=True),
        add_and_norm,
        [x, residual, w],
        fwd=4,
        bwd=4,
    )


def measure(operation: Operation, timer: gpu.Timer) -> list[dict[str, Any]]:
    """A row for each pass; RuntimeError if the methods do not agree."""
    import torch

    outs = {method: operation.outs(method) for method in METHODS}
    made = [torch.randn_like(x) for x in outs[EAGER]]
    douts = {m: [dout.to(x.dtype) for dout, x in zip(made, outs[m])] for m in METHODS}

    def gradients(method: str) -> Any:
        given = (outs[method], operation.leaves, douts[method])
        return torch.autograd.grad(*given, retain_graph=True)

    results = {m: [*(x.detach() for x in outs[m]), *gradients(m)] for m in METHODS}
    found = max(distance(x, y) for m in METHODS for x, y in zip(results[m], results[EAGER]))
    if not found <= gpu.MAX_DIFFERENCE:
        raise RuntimeError(f"{operation.name}: the results differ by {found:.1e} of their norm")
    del results
    rows = []
    for passes in PASSES:
        calls = {
            m: operation.functions[m] if passes == "fwd" else lambda m=m: gradients(m)
            for m in METHODS
        }
        rounds = gpu.take_turns(calls, timer, **TIMING)
        ms = {m: median(times) for m, times in rounds.items()}
        rows.append({
            "operation": operation.name,
            "passes": passes,
            "ms": ms,
            "gb_s": {m: operation.gbytes(passes) / time * 1e3 for m, time in ms.items()},
            "difference": found,
        })  # fmt: skip
    return rows


def copy_rate(timer: gpu.Timer) -> float:
    """GB/s of a copy, read and written."""
    import torch

    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() * 1e-6 / median(timer(lambda: y.copy_(x), 20))


def run(out: Optional[Path]) -> Path:
    """Measures everything on the current GPU and writes the result."""
    os.environ["FLASH_ATTN_BACKEND"] = "triton"
    import torch
    import torch._functorch.config
    import triton
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch._functorch.config.donated_buffer = False  # a graph is walked many times
    timer, rows, ops = gpu.CudaTimer(), [], []
    rate = copy_rate(timer)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        cpu = gpu.cpu_times()
        for case in cases():
            rows += gpu.measure(case, timer, passes=PASSES, **TIMING)
            told = ", ".join(f"{row['passes']} {row['ratio']['median']:.2f}" for row in rows[-2:])
            mask = "causal" if case.causal else "full"
            print(f"{case.head_dim} {mask} {case.seqlen}: {told}", file=sys.stderr)
            torch.cuda.empty_cache()
    for operation in operations("cuda"):
        ops += measure(operation, timer)
        for row in ops[-2:]:
            told = ", ".join(f"{method} {rate:.0f}" for method, rate in row["gb_s"].items())
            print(f"{row['operation']}, {row['passes']}: GB/s {told}", file=sys.stderr)
    machine = report.of_gpu("triton", {"Triton": triton.__version__})
    del machine["kernels"]
    tables = {"cpu": cpu, "operations": ops, "rows": rows}
    return report.write({**machine, "copy_gb_s": rate, **tables}, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    print(run(parser.parse_args().out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
