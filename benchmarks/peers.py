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
import importlib
import random
import site
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Optional

import gpu

OURS = gpu.OURS
PASSES = ("fwd", "bwd")
SEQLENS = (512, 1024, 2048, 4096, 16384)
LENGTHS = tuple(random.Random(1234 + i).randint(100, 4000) for i in range(16))
ROUNDS, WARM_UP_MS, TOTAL_MS = gpu.ROUNDS, 20.0, 75.0


@dataclass(frozen=True)
class Case:
    """q, k, v, dout of (batch, seqlen, heads, head_dim); `lengths`: packed sequences instead."""

    kind: str
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int = -1  # keys to the left of a query's own, and none to its right
    dtype: str = "bfloat16"
    lengths: Optional[tuple[int, ...]] = None

    @property
    def window_size(self) -> tuple[int, int]:
        return (self.window, 0) if self.window >= 0 else (-1, -1)

    def flops(self, passes: str) -> float:
        """Useful work: of pairs that no mask hides."""
        pairs = 0.0
        for seqlen in self.lengths or (self.seqlen,) * self.batch:
            if self.window >= 0:
                width = self.window + 1
                pairs += seqlen * width - width * (width - 1) / 2
            else:
                pairs += seqlen**2 * (0.5 if self.causal else 1.0)
        return gpu.FLOPS_OF_PASS[passes] * 4 * self.heads * pairs * self.head_dim


def cases() -> Iterator[Case]:
    """Equal tokens and width for all dense ones, then what else people run."""
    for head_dim, causal, seqlen in product((64, 128, 256), (False, True), SEQLENS):
        batch, heads = gpu.TOKENS // seqlen, gpu.HIDDEN // head_dim
        yield Case("dense", batch, seqlen, heads, heads, head_dim, causal)
    for head_dim, heads in ((96, 16), (192, 8)):
        yield Case("dense", 4, 4096, heads, heads, head_dim, causal=False)
    yield Case("fp16", 4, 4096, 16, 16, 128, causal=False, dtype="float16")
    yield Case("32 heads, 8 of K and V", 2, 8192, 32, 8, 128, causal=True)
    for head_dim in (64, 128):
        heads = gpu.HIDDEN // head_dim
        yield Case("window of 1024", 1, 16384, heads, heads, head_dim, causal=False, window=1023)
    for causal in (False, True):
        longest = max(LENGTHS)
        yield Case("packed", len(LENGTHS), longest, 16, 16, 128, causal, lengths=LENGTHS)


class Inputs:
    """Random normal tensors of a case."""

    def __init__(self, case: Case) -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(case.seqlen + case.head_dim)
        kind: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "device": "cuda"}
        rows = (sum(case.lengths),) if case.lengths else (case.batch, case.seqlen)

        def rand(heads: int) -> Any:
            return torch.randn((*rows, heads, case.head_dim), generator=generator, **kind)

        self.case = case
        self.qkv = [rand(h).requires_grad_() for h in (case.heads, case.kv_heads, case.kv_heads)]
        self.dout = rand(case.heads)
        self.cu_seqlens = None
        if case.lengths:
            ends = torch.tensor((0, *case.lengths), dtype=torch.int32).cumsum(0)
            self.cu_seqlens = ends.to(device="cuda", dtype=torch.int32)


class Method(ABC):
    """One way to compute attention, and its gradients, of some inputs."""

    @staticmethod
    def takes(case: Case) -> bool:
        return True

    @abstractmethod
    def __init__(self, inputs: Inputs) -> None: ...

    @abstractmethod
    def forward(self) -> Any: ...

    @abstractmethod
    def backward(self) -> Any: ...


class Autograd(Method):
    """A method whose backward is torch's."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.out = self.attend()

    @abstractmethod
    def attend(self) -> Any: ...

    def forward(self) -> Any:
        import torch

        with torch.no_grad():
            return self.attend()

    def backward(self) -> Any:
        import torch

        inputs = self.inputs
        return torch.autograd.grad(self.out, inputs.qkv, inputs.dout, retain_graph=True)


class FlashAttn(Autograd):
    """The public functions."""

    def attend(self) -> Any:
        import flash_attn

        return self.attend_by(flash_attn)

    def attend_by(self, functions: Any) -> Any:
        """`functions`: what has flash_attn_func and flash_attn_varlen_func."""
        case = self.inputs.case
        rule: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size}
        if not case.lengths:
            return functions.flash_attn_func(*self.inputs.qkv, **rule)
        for side in "qk":
            rule[f"cu_seqlens_{side}"] = self.inputs.cu_seqlens
            rule[f"max_seqlen_{side}"] = max(case.lengths)
        return functions.flash_attn_varlen_func(*self.inputs.qkv, **rule)


class FlashAttention4(FlashAttn):
    """The functions of the same names of `flash_attn.cute`, which give the log-sum-exp too."""

    def attend(self) -> Any:
        return self.attend_by(importlib.import_module("flash_attn.cute"))[0]


class CuDnn(Autograd):
    """torch SDPA with its cuDNN backend."""

    @staticmethod
    def takes(case: Case) -> bool:
        return case.window < 0 and not case.lengths

    def attend(self) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        case = self.inputs.case
        heads_first = [x.transpose(1, 2) for x in self.inputs.qkv]
        groups = case.heads != case.kv_heads
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(
                *heads_first, is_causal=case.causal, enable_gqa=groups
            )
        return out.transpose(1, 2)


class FlashAttention3(Method):
    """The operators of its extension."""

    def __init__(self, inputs: Inputs) -> None:
        import torch

        self.inputs = inputs
        self.ops = torch.ops.flash_attn_3
        self.qkv = [x.detach() for x in inputs.qkv]
        self.out, self.lse = self._forward()

    def _forward(self) -> Any:
        case, starts = self.inputs.case, self.inputs.cu_seqlens
        packed = {}
        if case.lengths:
            longest = max(case.lengths)
            packed = {
                "cu_seqlens_q": starts,
                "cu_seqlens_k": starts,
                "max_seqlen_q": longest,
                "max_seqlen_k": longest,
            }
        left, right = case.window_size
        return self.ops.fwd.default(
            *self.qkv,
            is_causal=case.causal,
            window_size_left=left,
            window_size_right=right,
            num_splits=1,
            **packed,
        )[:2]

    def forward(self) -> Any:
        return self._forward()[0]

    def backward(self) -> Any:
        import torch

        case, starts = self.inputs.case, self.inputs.cu_seqlens
        longest = max(case.lengths) if case.lengths else None
        made = [torch.empty_like(x) for x in self.qkv]
        given = (self.inputs.dout, *self.qkv, self.out, self.lse, *made, starts, starts)
        rule = (case.causal, *case.window_size)
        self.ops.bwd.default(*given, None, None, longest, longest, None, *rule)
        return made


Methods = dict[str, type[Method]]


def load(fa3: Path, fa4: Optional[Path]) -> Methods:
    """Ours, and those of the libraries given."""
    import torch

    torch.ops.load_library(str(fa3))
    methods: Methods = {OURS: FlashAttn, "FlashAttention-3": FlashAttention3}
    if fa4:
        add_cute(fa4)
        methods["FlashAttention-4"] = FlashAttention4
    return {**methods, "cuDNN": CuDnn}


def add_cute(folder: Path) -> None:
    """Lets `flash_attn.cute` be imported from a folder, all else of that name being ours."""
    import flash_attn

    site.addsitedir(str(folder))
    flash_attn.__path__.append(str(folder / "flash_attn"))


def ready(inputs: Inputs, methods: Methods) -> dict[str, Any]:
    """The methods that take a case, run once."""
    return {name: made(inputs) for name, made in methods.items() if made.takes(inputs.case)}


def difference(methods: dict[str, Any]) -> float:
    """How far others are from ours: out, dq, dk, dv, the largest of all."""

    def all_of(method: Any) -> list[Any]:
        return [method.forward(), *method.backward()]

    ours = all_of(methods[OURS])
    return max(
        ((x.double() - y.double()).norm() / y.double().norm()).item()
        for name, method in methods.items()
        if name != OURS
        for x, y in zip(ours, all_of(method))
    )


def take_turns(calls: dict[str, Callable[[], Any]], timer: gpu.Timer) -> dict[str, list[float]]:
    """Milliseconds of each round by method, in an order drawn anew for each round."""
    draw = random.Random(0)
    orders = [draw.sample(list(calls), len(calls)) for _ in range(ROUNDS)]
    return gpu.take_turns(calls, timer, orders, WARM_UP_MS, TOTAL_MS)


def measure(case: Case, timer: gpu.Timer, known: Methods) -> list[dict[str, Any]]:
    """A row for each pass; RuntimeError if the methods do not agree."""
    methods = ready(Inputs(case), known)
    found = difference(methods)
    if not found <= gpu.MAX_DIFFERENCE:
        raise RuntimeError(f"{case}: the results differ by {found:.1e} of their norm")
    rows = []
    for passes in PASSES:
        calls = {
            name: method.forward if passes == "fwd" else method.backward
            for name, method in methods.items()
        }
        ms = {name: median(times) for name, times in take_turns(calls, timer).items()}
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


def run(fa3: Path, fa4: Optional[Path], out: Optional[Path]) -> Path:
    """Measures everything on the current GPU and writes the result."""
    import torch

    methods, timer, rows = load(fa3, fa4), gpu.CudaTimer(), []
    for case in cases():
        rows += measure(case, timer, methods)
        told = ", ".join(f"{row['passes']} {row['ratio']:.3f}" for row in rows[-2:])
        mask = "causal" if case.causal else "full"
        print(f"{case.kind} {case.head_dim} {mask} {case.seqlen}: {told}", file=sys.stderr)
        torch.cuda.empty_cache()
    machine = gpu.machine()
    machine["versions"]["cuDNN"] = str(torch.backends.cudnn.version())
    if fa4:
        for name in ("flash-attn-4", "nvidia-cutlass-dsl"):
            machine["versions"][name] = version(name)
    result = {**machine, "kind": "peers", "rows": rows}
    name = f"{result['date']}-peers-{gpu.slug(result['device'])}.json"
    return gpu.write(result, out or gpu.RESULTS / name)


def main() -> int:
    def add_options(runs: argparse.ArgumentParser) -> None:
        runs.add_argument("--fa3", type=Path, required=True, help="FlashAttention-3's extension")
        runs.add_argument("--fa4", type=Path, help="a folder that has FlashAttention-4 installed")

    def draw(result: dict[str, Any], picture: Path) -> None:
        from plot import plot_peers

        plot_peers(result, picture)

    return gpu.run_or_plot(__doc__ or "", add_options, lambda a: run(a.fa3, a.fa4, a.out), draw)


if __name__ == "__main__":
    sys.exit(main())
