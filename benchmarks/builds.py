"""Builds of this package against one another on one GPU: what a change of a kernel brings.

    python benchmarks/builds.py FOLDER FOLDER... [--only PATTERN] [--passes fwd bwd] [--rounds N]

Each FOLDER is a checkout after `python -m build_tools all`, or a copy of its modules; others are
compared with the first. Each build has a process of its own for the whole run. They take turns at
each case, a round of some milliseconds at a time, and another one is first in each round, so that
clocks and temperature weigh on all alike. Writes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import fp8
import gpu
import peers
from peer_methods import Case, FlashAttn, Inputs

PASSES = ("fwd", "bwd")
WARM_UP_MS, TOTAL_MS = 4.0, 15.0

Call = Callable[[], Any]


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


def round_of(call: Call, timer: gpu.Timer) -> float:
    """Milliseconds of a call: the median of as many as take TOTAL_MS."""
    estimate = max(median(timer(call, gpu.MIN_CALLS)), 1e-3)
    timer(call, int(WARM_UP_MS / estimate) + 1)
    return median(timer(call, max(gpu.MIN_CALLS, int(TOTAL_MS / estimate))))


def work(names: Iterable[str], replies: TextIO, timer: gpu.Timer) -> None:
    """Times a round of each case that is named, of the build that is imported here."""
    made = dict(cases(PASSES))
    calls: dict[str, Call] = {}
    for name in map(str.strip, names):
        if name not in calls:
            calls.clear()  # what the last one holds is free before this one's is taken
            calls[name] = made[name]()
        replies.write(f"{round_of(calls[name], timer)}\n")
        replies.flush()


class Build:
    """A process that imports the build in `folder`, and times it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env={**os.environ, "PYTHONPATH": str(folder.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Build:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def time(self, name: str) -> float:
        """Milliseconds of a round of the case; RuntimeError where the build fails in it."""
        with suppress(BrokenPipeError):
            print(name, file=self._process.stdin, flush=True)
        assert self._process.stdout
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"{self.folder}: the build has failed in {name}, see above")
        return float(reply)


def take_turns(builds: Sequence[Build], name: str, rounds: int) -> list[list[float]]:
    """Milliseconds of each build in each round."""
    times: list[list[float]] = [[0.0] * rounds for _ in builds]
    for turn in range(rounds):
        for i in range(len(builds)):
            at = (turn + i) % len(builds)
            times[at][turn] = builds[at].time(name)
    return times


def row(name: str, times: Sequence[Sequence[float]]) -> str:
    """Microseconds, and by how much a build is faster than the first: the median of the rounds,
    and half the distance from the smallest to the largest."""
    base, *others = times
    cells = [f"{median(base) * 1e3:.1f}"]
    for other in others:
        gains = [100 * (ours / theirs - 1) for ours, theirs in zip(base, other, strict=True)]
        half = (max(gains) - min(gains)) / 2
        cells.append(f"{median(other) * 1e3:.1f} ({median(gains):+.1f} % ±{half:.1f})")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="builds; the first is the base")
    parser.add_argument("--only", default="", help="cases whose names have this (a pattern)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed is none
        work(sys.stdin, replies, gpu.CudaTimer())
        return 0
    if len(arguments.folders) < 2:
        parser.error("name two builds or more")
    names = [x for x, _ in cases(arguments.passes) if re.search(arguments.only, x)]
    with ExitStack() as stack:
        builds = [stack.enter_context(Build(folder)) for folder in arguments.folders]
        first, *others = (str(build.folder) for build in builds)
        print(f"| Case | {first}, us | {' | '.join(others)} |")
        print("| --- | --- |" + " --- |" * len(others))
        for name in names:
            print(row(name, take_turns(builds, name, arguments.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
