"""PyTorch's own attention with this package's kernels under it, against its own, in one run.

    python benchmarks/under_sdpa.py run                 measure; writes a JSON file
    python benchmarks/under_sdpa.py plot RESULT.json    draw what was measured beside it, as a PNG

`torch.nn.attention.activate_flash_attention_impl("flash_attn")` puts the kernels under
`scaled_dot_product_attention` (torch 2.11 and later); against it stands what torch chooses by
itself. README.md beside this file has the method, which is that of gpu.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gpu
import report


def switch(method: str) -> None:
    """From here on SDPA runs the kernels of `method`."""
    from torch.nn import attention

    import flash_attn  # noqa: F401 (makes its name known)

    is_ours = attention.current_flash_attention_impl() is not None
    if method == gpu.OURS and not is_ours:
        attention.activate_flash_attention_impl("flash_attn")
    elif method != gpu.OURS and is_ours:
        attention.restore_flash_attention_impl()


class Calls(gpu.Calls):
    """Calls of SDPA: what runs under it is the method."""

    def attention(self, method: str) -> Any:
        switch(method)
        return super().attention(gpu.THEIRS)

    def gradients(self, method: str) -> Any:
        switch(method)
        return super().gradients(method)


def cpu_times(device: str = "cuda") -> list[dict[str, Any]]:
    """As `gpu.cpu_times`, but one method behind the other: to switch costs more than a call."""
    import torch

    calls = Calls(gpu.Case("bfloat16", *gpu.CPU_SHAPE, causal=False), device)
    rows = []
    for needs_grad in (False, True):
        us = {}
        for method in gpu.METHODS:
            with torch.set_grad_enabled(needs_grad):
                turns = gpu.cpu_turns(
                    {method: lambda method=method: calls.attention(method)}, device
                )
            us[method] = gpu.spread(turns[method])
        rows.append({"gradients": needs_grad, "us": us})
    return rows


def run(out: Path | None) -> Path:
    """Measures everything on the current GPU and writes the result."""
    try:
        cpu = cpu_times()
        rows = gpu.rows_of(gpu.cases(["bfloat16"]), Calls)
    finally:
        switch(gpu.THEIRS)
    return report.write({**report.of_gpu("under_sdpa"), "cpu": cpu, "rows": rows}, out)


def main() -> int:
    def add_options(runs: argparse.ArgumentParser) -> None:
        pass

    def draw(result: dict[str, Any], picture: Path) -> None:
        from plot import plot_ratios

        plot_ratios(result, picture)

    return report.run_or_plot(__doc__ or "", add_options, lambda a: run(a.out), draw)


if __name__ == "__main__":
    sys.exit(main())
