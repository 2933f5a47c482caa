"""Machine code read back: a cubin's instructions by nvdisasm, and those of PTX as they stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from native_tools import ROOT

from build_tools.paths import env, package_folders

assert ROOT  # native_tools puts the project on the path
# `/*0a30*/  @!P0 LDG.E.128 R4, [R2.64] ;`: the predicate is no part of the instruction's name.
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_PTX = re.compile(r"^\s*(?:@!?%?\w+\s+)?([a-z][\w.:]*)\s", re.MULTILINE)


@cache
def nvdisasm() -> str:
    """The disassembler of the Python package, else of a toolkit; none skips the test."""
    homes = [*package_folders(), Path(env.CUDA_HOME.text() or "/usr/local/cuda")]
    found = [path for home in homes for path in home.glob("nvidia/*/bin/nvdisasm")]
    found += [path for home in homes for path in home.glob("bin/nvdisasm")]
    program = str(found[0]) if found else shutil.which("nvdisasm")
    if program is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    return program


def _listing(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvdisasm(), file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass(cubin: bytes) -> Counter[str]:
    """How often each instruction, with its modifiers, stands in a cubin."""
    return Counter(_SASS.findall(_listing(cubin)))


def main_loop(cubin: bytes, number: int, pattern: str = "HGMMA") -> Counter[str]:
    """The same of a kernel's shortest loop of at least so many instructions of a name."""
    lines = _listing(cubin).splitlines()
    labels = {line.strip()[:-1]: at for at, line in enumerate(lines) if line.startswith(".L_")}
    loops = []
    for at, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if target and labels[target[1]] < at:
            loop = Counter(_SASS.findall("\n".join(lines[labels[target[1]] : at + 1])))
            if count(loop, pattern) >= number:
                loops.append(loop)
    return min(loops, key=lambda loop: sum(loop.values()))


def ptx(text: bytes) -> Counter[str]:
    """The same for PTX, whose last byte is a zero."""
    return Counter(_PTX.findall(text.rstrip(b"\0").decode()))


def count(code: Counter[str], pattern: str) -> int:
    """How many instructions have a name that a pattern matches from its start."""
    return sum(number for name, number in code.items() if re.match(pattern, name))
