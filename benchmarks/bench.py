"""`make bench`: time and peak extra memory on the CPU, against PyTorch SDPA and standard attention.

Writes benchmarks/results/<date>-<processor>.json, from which tools/render_docs.py makes the tables.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import report
import torch
from measure import METHODS, PASSES, SCORES, Case, available_bytes, measure
from rich.console import Console
from rich.progress import Progress

import flash_attn

HEAD_DIM = 64
# Length and heads: the long one is a single head, so that standard attention fits as well.
SIZES = ((2048, 8), (4096, 4), (16384, 1))
DTYPE = "float32"


def plan(threads: int) -> list[Case]:
    """Every case, in the order of the table."""
    cases = [
        Case(method, passes, scores, seqlen, heads, HEAD_DIM, DTYPE, "cpu", threads)
        for (seqlen, heads), scores, passes, method in product(SIZES, SCORES, PASSES, METHODS)
    ]
    return [case for case in cases if case.is_possible]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    threads = parser.parse_args().threads
    console = Console(stderr=True)
    cases = plan(threads)
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for case in cases:
            what = f"{case.seqlen} {case.scores}, {case.passes}, {case.method}"
            progress.update(task, description=what)
            if case.method == "standard" and case.standard_bytes > available_bytes():
                console.print(f"no room for {what}", highlight=False)
            else:
                rows.append({**asdict(case), **asdict(measure(case))})
            progress.advance(task)
    versions = {
        "flash-attn": flash_attn.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    result = {"threads": threads, "versions": versions, "rows": rows}
    path = report.write({**report.of_processor("cpu"), **result})
    console.print(f"wrote {path.relative_to(Path.cwd())}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
