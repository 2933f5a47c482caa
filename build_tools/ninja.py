"""Runs compile jobs through ninja: progress with the time left, and a retry when one was killed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from build_tools.compile_part import TOLD
from build_tools.compilers import TO_INSTALL
from build_tools.parts import Part
from build_tools.paths import ROOT

_STATUS = re.compile(r"^@(\d+)/(\d+)@ (.*)$")
# What ninja says of parts that failed: the reason stands elsewhere.
_OF_NINJA = re.compile(r"ninja: (?!error:|fatal:)|FAILED: |.* -m build_tools\.compile_part ")
# What the shell around a part says of one that ended badly.
_ENDED = re.compile(r"^@ended (\d+)@$")


class BuildError(RuntimeError):
    """A build that cannot be finished, with the reason."""


def find_ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if not found:
        raise BuildError(f"ninja is not installed: `{TO_INSTALL}`")
    return found


def build(parts: list[Part], compiler: str, path: Optional[str], folder: Path, jobs: int) -> None:
    """Compiles what is missing of `parts`; BuildError if some of it does not compile.

    A process that is killed most likely took too much memory: the rest is tried again with half as
    many jobs.
    """
    missing = [part for part in parts if not part.is_built]
    while missing:
        for part in missing:
            part.error.unlink(missing_ok=True)
        file = _write(missing, compiler, path, folder)
        _run(file, folder, jobs)
        refused = [part for part in missing if part.error.exists()]
        if refused:
            told = "\n\n".join(f"{p.stem}:\n{p.error.read_text('utf-8')}" for p in refused[:3])
            raise BuildError(f"{len(refused)} units do not compile.\n{told}")
        left = [part for part in missing if not part.is_built]
        if left and jobs == 1 and len(left) == len(missing):
            raise BuildError(f"compiling {left[0].stem} is killed each time: too little memory?")
        if left:
            jobs = max(1, jobs // 2)
            print(f"{len(left)} compilers were killed; going on with {jobs} at a time", flush=True)
        missing = left


def _write(parts: list[Part], compiler: str, path: Optional[str], folder: Path) -> Path:
    command = f"{_quoted(sys.executable)} -m build_tools.compile_part $in"
    lines = [
        f"builddir = {_escaped(folder)}",
        "rule part",
        f'  command = {command} || {{ s=$$?; echo "@ended $$s@"; exit $$s; }}',
        "  description = $label",
    ]
    for part in parts:
        job = folder / f"{part.stem}.job"
        words = {
            "symbol": part.unit.symbol,
            "arch": str(part.arch),
            "compiler": compiler,
            "path": path,
            "folder": str(part.folder),
            "stem": part.stem,
        }
        job.write_text(json.dumps(words), "utf-8")
        label = f"{part.unit.symbol} {part.arch}"
        lines += [f"build {_escaped(part.code)}: part {_escaped(job)}", f"  label = {label}"]
    file = folder / "build.ninja"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def _quoted(text: str) -> str:
    """A word of a shell's command as ninja reads it."""
    return shlex.quote(text).replace("$", "$$")


def _escaped(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _run(file: Path, folder: Path, jobs: int) -> None:
    """Runs ninja; BuildError if a part ends otherwise than made, refused or killed."""
    command = [find_ninja(), "-f", str(file), "-j", str(jobs), "-k", "0"]
    # env(1) hands ninja its status line without touching this process's environment.
    status = "NINJA_STATUS=@%f/%t@ "
    start = time.monotonic()
    with subprocess.Popen(
        ["env", status, f"PYTHONPATH={ROOT}", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None
        said, ended = show(child.stdout, start)
    is_odd = any(status <= 128 for status in ended - {TOLD})
    if is_odd or (child.returncode > 0 and not ended):
        words = "\n".join(said[-10:]) or f"ninja ended with status {child.returncode}"
        raise BuildError(f"compiling failed: {words}")


def show(lines: Iterable[str], start: float) -> tuple[list[str], set[int]]:
    """Prints ninja's lines, each with the time it should take from here.

    Returns:
        (what was said besides progress, statuses of parts that ended badly).
    """
    said: list[str] = []
    ended: set[int] = set()
    for line in map(str.rstrip, lines):
        found = _STATUS.match(line)
        if found is None:
            failed = _ENDED.match(line)
            if failed is not None:
                ended.add(int(failed[1]))
            elif not _OF_NINJA.match(line):
                said.append(line)
                print(line, flush=True)
            continue
        done, total, what = int(found[1]), int(found[2]), found[3]
        spent = time.monotonic() - start
        left = spent / done * (total - done) if done else 0.0
        print(f"[{done}/{total}] {spent:4.0f} s, {left:4.0f} s to go  {what}", flush=True)
    return said, ended
