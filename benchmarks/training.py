"""A transformer of random weights, trained for a few steps with each attention in turn.

    python benchmarks/training.py run --fa3 LIBRARY    writes results/<date>-training-<gpu>.json
    python benchmarks/training.py plot RESULT.json     draws it beside that file, as a PNG

The same weights and the same data for all: what differs between two curves is rounding. How far
SDPA's backends are from each other tells how much that is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Optional

import fa3_operators
import gpu
import report

Attention = Callable[[Any, Any, Any], Any]

OURS, FA3 = gpu.OURS, "FlashAttention-3"
WARM_UP = 5  # steps whose time does not count


@dataclass(frozen=True)
class Size:
    """Of the model, its data and its steps.

    `learning_rate`: at 1e-3 a model of the usual size falls so wildly that any two attentions part.
    """

    layers: int = 4
    heads: int = 16
    head_dim: int = 128
    vocabulary: int = 1024
    batch: int = 4
    seqlen: int = 4096
    steps: int = 30
    learning_rate: float = 1e-4


def model_of(size: Size, attend: Attention) -> Any:
    """A decoder with causal attention, weights drawn from one seed."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = size.heads * size.head_dim
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )

        def forward(self, x: Any) -> Any:
            qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, size.heads, size.head_dim))
            x = x + self.out(attend(*qkv.unbind(2)).flatten(2))
            return x + self.mlp(self.norms[1](x))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = size.heads * size.head_dim
            self.tokens = nn.Embedding(size.vocabulary, width)
            self.places = nn.Embedding(size.seqlen, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(size.layers)))
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size.vocabulary))

        def forward(self, tokens: Any) -> Any:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            return self.head(self.blocks(self.tokens(tokens) + self.places(places)))

    torch.manual_seed(0)
    return Decoder()


def batches(size: Size, device: str) -> Iterator[Any]:
    """Tokens that follow from the one before by a fixed rule, but for one in ten."""
    import torch

    draw = torch.Generator(device).manual_seed(1)
    kind: dict[str, Any] = {"generator": draw, "device": device}
    rule = torch.randperm(size.vocabulary, **kind)
    ahead = [torch.arange(size.vocabulary, device=device)]  # what stands so many places further
    for _ in range(size.seqlen):
        ahead.append(rule[ahead[-1]])
    table = torch.stack(ahead)
    shape = (size.batch, size.seqlen + 1)
    places = torch.arange(shape[1], device=device).expand(shape)
    for _ in range(size.steps):
        drawn = torch.randint(size.vocabulary, shape, **kind)
        follows = torch.rand(shape, **kind) < 0.9
        since = places.masked_fill(follows, 0).cummax(1).values
        yield table[places - since, drawn.gather(1, since)]


def train(size: Size, attend: Attention, data: list[Any], device: str) -> dict[str, list[float]]:
    """Loss and milliseconds of each step."""
    import torch
    from torch.nn.functional import cross_entropy

    with torch.device(device):
        model = model_of(size, attend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate)
    clock = Clock(device)
    losses = []
    for tokens in data:
        clock.tick()
        with torch.autocast(device, torch.bfloat16):
            found = model(tokens[:, :-1])
        loss = cross_entropy(found.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    clock.tick()
    return {"losses": [x.item() for x in losses], "ms": clock.intervals()}


class Clock:
    """Times between ticks, on the device."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._ticks: list[Any] = []

    def tick(self) -> None:
        import time

        import torch

        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        import torch

        pairs = list(zip(self._ticks, self._ticks[1:]))
        if not self._is_cuda:
            return [(end - start) * 1e3 for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def ours(q: Any, k: Any, v: Any) -> Any:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def sdpa(backend: str) -> Attention:
    """torch SDPA with one of its backends; "" leaves the choice to it."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        from contextlib import nullcontext

        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
            return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return attend


def fa3() -> Attention:
    """The operators of FlashAttention-3's extension."""
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            out, lse = fa3_operators.forward(q, k, v, causal=True)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return tuple(fa3_operators.backward(dout.contiguous(), *ctx.saved_tensors, causal=True))

    def attend(q: Any, k: Any, v: Any) -> Any:
        return Function.apply(q, k, v)

    return attend


def run(library: Optional[Path], out: Optional[Path]) -> Path:
    """Trains on the current GPU and writes the result."""
    import torch

    methods = {
        OURS: ours,
        "torch SDPA, flash": sdpa("FLASH_ATTENTION"),
        "torch SDPA, cuDNN": sdpa("CUDNN_ATTENTION"),
    }
    if library is not None:
        torch.ops.load_library(str(library))
        methods[FA3] = fa3()
    size = Size()
    data = list(batches(size, "cuda"))
    rows = []
    for name, attend in methods.items():
        found = train(size, attend, data, "cuda")
        step_ms = median(found["ms"][WARM_UP:])
        rows.append({"method": name, "step_ms": step_ms, **found})
        print(f"{name}: {step_ms:.1f} ms a step, loss {found['losses'][-1]:.4f}", file=sys.stderr)
        torch.cuda.empty_cache()
    return report.write({**report.of_gpu("training"), "size": asdict(size), "rows": rows}, out)


def main() -> int:
    def add_options(runs: argparse.ArgumentParser) -> None:
        runs.add_argument("--fa3", type=Path, help="FlashAttention-3's extension")

    def draw(result: dict[str, Any], picture: Path) -> None:
        from plot import plot_training

        plot_training(result, picture)

    return report.run_or_plot(__doc__ or "", add_options, lambda a: run(a.fa3, a.out), draw)


if __name__ == "__main__":
    sys.exit(main())
