"""Builds of this package against one another on one GPU: what a change of a kernel brings.

    python benchmarks/builds.py FOLDER FOLDER... [--only PATTERN] [--passes fwd bwd] [--rounds N]

Each FOLDER is a checkout after `python -m build_tools all`, or a copy of its modules; others are
compared with the first. Builds take turns in processes of their own, which do the same cases in the
same order, so that clocks and temperature weigh on all alike: one that does more in front of a case
looks 1 to 3 % slower in it. The fastest round of each case counts. Writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fp8
import gpu
import peers
from peer_methods import OURS, Case, FlashAttn, Inputs

PASSES = ("fwd", "bwd")
WARM_UP_MS, TOTAL_MS = 4.0, 15.0

Call = Callable[[], Any]
Times = dict[str, list[float]]


def cases(passes: Sequence[str]) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Every case by name, and what makes its call: those of peers.py and fp8.py."""
    for case in peers.cases():
        shape = f"{case.kind}, {case.head_dim} {case.mask} {case.seqlen}"
        for done in passes:
            yield f"{shape} {done}", partial(call_of, case, done)
    for other in fp8.cases() if "fwd" in passes else ():
        heads = "" if other.heads == other.kv_heads else ", grouped heads"
        shape = f"FP8{heads}, {other.head_dim} {other.mask} {other.seqlen}"
        yield f"{shape} fwd", partial(call_of_fp8, other)


def call_of(case: Case, passes: str) -> Call:
    method = FlashAttn(Inputs(case))
    return fp8.captured(method.forward) if passes == "fwd" else method.of(passes)


def call_of_fp8(case: fp8.Case) -> Call:
    return fp8.captured(partial(fp8.flash_attn, fp8.Inputs(case)))


def measure(only: str, passes: Sequence[str], timer: gpu.Timer) -> dict[str, float]:
    """Milliseconds of each case, of the build that is imported here."""
    found = {}
    for name, make in cases(passes):
        if re.search(only, name):
            calls = {OURS: make()}
            rounds = gpu.take_turns(calls, timer, [(OURS,)], WARM_UP_MS, gpu.ROUNDS * TOTAL_MS)
            found[name] = rounds[OURS][0]
    return found


def measured_in(folder: Path, options: Sequence[str]) -> dict[str, float]:
    """The same of the build in a folder, by a process of its own."""
    command = [sys.executable, __file__, "--worker", *options]
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def lines(times: dict[str, Times]) -> Iterator[str]:
    """A row for each case: microseconds, and by how much a build is faster than the first."""
    first, *others = times
    yield f"| Case | {first}, us | {' | '.join(others)} |"
    yield "| --- | --- |" + " --- |" * len(others)
    for name, rounds in times[first].items():
        base = min(rounds)
        fastest = [min(times[other][name]) for other in others]
        cells = (f"{x * 1e3:.1f} ({base / x - 1:+.1%})" for x in fastest)
        yield f"| {name} | {base * 1e3:.1f} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="builds; the first is the base")
    parser.add_argument("--only", default="", help="cases whose names have this (a pattern)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.only, arguments.passes, gpu.CudaTimer())))
        return 0
    if len(arguments.folders) < 2:
        parser.error("name two builds or more")
    options = ["--only", arguments.only, "--passes", *arguments.passes]
    times: dict[str, Times] = {str(folder): {} for folder in arguments.folders}
    for turn in range(arguments.rounds):
        for folder in arguments.folders:
            print(f"round {turn + 1} of {arguments.rounds}: {folder}", file=sys.stderr)
            for name, ms in measured_in(folder, options).items():
                times[str(folder)].setdefault(name, []).append(ms)
    print("\n".join(lines(times)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
