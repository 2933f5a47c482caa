"""`make demo`: the quickstart checked, and attention against standard attention as length grows.

Exits with status 1 if any result is further from float64 than the rule allows.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import torch
from measure import PASSES, Case, Result, available_bytes, measure
from plot import plot_growth
from quickstart import Example, Inputs, examples, text_inputs
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from standard import standard_attention
from torch import Tensor

import flash_attn
from flash_attn import flash_attn_func

METHODS = ("flash_attn", "standard")
LENGTHS = {"cpu": (512, 1024, 2048, 4096, 8192), "cuda": (512, 1024, 2048, 4096, 8192, 16384)}
HEADS, HEAD_DIM = 2, 64
REFERENCE_ROWS = 512


@dataclass(frozen=True)
class Check:
    """How far a result is from float64, and how far it may be.

    The rule: at most twice the error of standard attention in the same precision, plus one
    rounding of the largest value.
    """

    error: float
    standard_error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    @property
    def cells(self) -> tuple[str, ...]:
        verdict = "[green]ok[/]" if self.passed else "[red]FAIL[/]"
        return (f"{self.error:.1e}", f"{self.standard_error:.1e}", verdict)


def check(out: Tensor, standard: Tensor, exact: Tensor) -> Check:
    """`exact` is float64; the others are in the precision of the call."""
    error, standard_error = ((x.double() - exact).abs().max().item() for x in (out, standard))
    rounding = torch.finfo(out.dtype).eps * exact.abs().max().item()
    return Check(error, standard_error, 2 * standard_error + rounding)


def best_device(console: Console) -> str:
    """ "cuda" if the package serves it here, else "cpu", saying why."""
    if not torch.cuda.is_available():
        return "cpu"
    try:
        q = torch.zeros(1, 1, 1, HEAD_DIM, dtype=torch.float16, device="cuda")
        flash_attn_func(q, q, q)
    except RuntimeError as error:
        console.print(f"There is a GPU, but it is not used: {error}", highlight=False)
        return "cpu"
    return "cuda"


def new_table(title: str, *names: str) -> Table:
    """An empty table; columns of words, which are capitalised, stand to the left."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", collapse_padding=True)
    for name in names:
        table.add_column(name, justify="left" if name[0].isupper() else "right", no_wrap=True)
    return table


def run_example(example: Example, inputs: Inputs) -> Check:
    exact = Inputs(*(getattr(inputs, f.name).double() for f in fields(inputs)))
    return check(example.run(inputs), example.standard(inputs), example.standard(exact))


def run_quickstart(console: Console, device: str) -> bool:
    """Runs every example and prints the table; whether all of them passed."""
    inputs = text_inputs(device, torch.bfloat16)
    b, s, h, d = inputs.q.shape
    title = f"Quickstart on {device}: bfloat16, {b} x {s} bytes of text, {h} heads x {d}"
    table = new_table(title, "Example", "Call", "error", "std error", "Check")
    all_passed = True
    for example in examples():
        result = run_example(example, inputs)
        all_passed &= result.passed
        table.add_row(example.title, example.call, *result.cells)
    console.print(table)
    return all_passed


def check_length(seqlen: int, dtype: torch.dtype, device: str) -> Check:
    """Causal attention of one length; the float64 side goes by rows, to stay small."""
    generator = torch.Generator(device).manual_seed(seqlen)
    shape = (1, seqlen, HEADS, HEAD_DIM)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )

    def by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = range(0, seqlen, REFERENCE_ROWS)
        rows = [(q[:, i : i + REFERENCE_ROWS], i + REFERENCE_ROWS) for i in starts]
        return torch.cat(
            [standard_attention(part, k[:, :n], v[:, :n], causal=True) for part, n in rows], dim=1
        )

    out = flash_attn_func(q, k, v, causal=True)
    return check(out, by_rows(q, k, v), by_rows(q.double(), k.double(), v.double()))


def run_growth(console: Console, device: str, plot: Path) -> bool:
    """Error, time and memory at growing lengths: the table and the picture."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    dtype_name = str(dtype).replace("torch.", "")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cases = [
        Case(method, passes, "causal", seqlen, HEADS, HEAD_DIM, dtype_name, device, threads or 1)
        for seqlen, passes, method in product(LENGTHS[device], PASSES, METHODS)
    ]
    results: dict[Case, Result] = {}
    checks: dict[int, Check] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=len(LENGTHS[device]) + len(cases))
        for seqlen in LENGTHS[device]:
            progress.update(task, description=f"length {seqlen}: error")
            checks[seqlen] = check_length(seqlen, dtype, device)
            progress.advance(task)
        for case in cases:
            progress.update(task, description=f"length {case.seqlen}: {case.passes}, {case.method}")
            if case.method != "standard" or fits(case):
                results[case] = measure(case)
            progress.advance(task)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    title = f"Causal attention, {dtype_name}, {HEADS} heads x {HEAD_DIM}, {name}"
    console.print(growth_table(title, cases, results, checks))
    plot_growth(results, title, plot)
    console.print(
        "error: largest distance from float64. MiB: peak memory beyond the inputs.\n"
        "std: standard attention, softmax(q k^T) v with the whole matrix in memory.",
        highlight=False,
    )
    console.print(f"Plot: {plot}", highlight=False)
    return all(result.passed for result in checks.values())


def fits(case: Case) -> bool:
    """Whether this machine has room for standard attention's matrices."""
    if case.device == "cuda":
        return case.standard_bytes < torch.cuda.mem_get_info()[0]
    return case.standard_bytes < available_bytes()


def growth_table(
    title: str, cases: list[Case], results: dict[Case, Result], checks: dict[int, Check]
) -> Table:
    """One row per length and pass: flash_attn's figure, then standard attention's."""
    names = ("Length", "Pass", "error", "std error", "Check", "ms", "std ms", "MiB", "std MiB")
    table = new_table(title, *names)
    for ours, standards in zip(cases[::2], cases[1::2]):
        is_first = ours.passes == PASSES[0]
        errors = checks[ours.seqlen].cells if is_first else ("", "", "")
        pair = [results.get(case) for case in (ours, standards)]
        times = [f"{r.seconds * 1e3:.1f}" if r else "-" for r in pair]
        bytes_ = [f"{r.extra_bytes / 2**20:.1f}" if r else "-" for r in pair]
        table.add_row(
            str(ours.seqlen) if is_first else "",
            ours.passes,
            *errors,
            *times,
            *bytes_,
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path, default=Path("build/demo.png"), help="PNG to write")
    arguments = parser.parse_args()
    console = Console()
    versions = f"flash-attn {flash_attn.__version__}, torch {torch.__version__}"
    console.print(f"{versions}, Python {platform.python_version()}", highlight=False)
    device = best_device(console)
    passed = run_quickstart(console, device)
    passed &= run_growth(console, device, arguments.plot)
    console.print("Every check passed." if passed else "A check FAILED.", highlight=False)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
