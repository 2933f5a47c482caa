"""What the tests of compiled code share: tools or a skip, a stub driver, kernels of no content."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from build_tools import codegen, compilers, kernels, native  # noqa: E402
from build_tools.arch import Arch  # noqa: E402
from build_tools.parts import Part  # noqa: E402


def needs(program: str) -> str:
    """The path of a program; the test is skipped where it is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def needs_nvrtc() -> compilers.Nvrtc:
    """The compiler of kernels; the test is skipped where it is not installed."""
    try:
        return compilers.Nvrtc()
    except FileNotFoundError as error:
        pytest.skip(str(error))


class Rows(ctypes.Structure):
    """flash::Rows."""

    _fields_ = [
        ("ptr", ctypes.c_uint64),
        ("batch", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("head", ctypes.c_int64),
    ]


class ForwardHead(ctypes.Structure):
    """The first fields of flash::ForwardParams."""

    _fields_ = [
        ("q", Rows),
        ("k", Rows),
        ("v", Rows),
        ("o", Rows),
        ("lse", ctypes.c_uint64),
        ("lse_batch", ctypes.c_int64),
        ("lse_head", ctypes.c_int64),
    ]


class Launch(NamedTuple):
    """One launch as the stub driver saw it."""

    kernel: str
    grid: int
    block: int
    smem: int
    context: int
    stream: int
    params: bytes


class Stub(NamedTuple):
    """A folder with the host library, a driver that runs nothing, and kernels without content."""

    folder: Path

    @property
    def host(self) -> Path:
        return self.folder / native.HOST_LIBRARY

    @property
    def kernels(self) -> Path:
        return self.folder / "kernels"

    def run(self, program: str, log: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a Python program that finds the stub driver as the system's."""
        log.touch()
        set_here = {
            "LD_LIBRARY_PATH": str(self.folder),
            "STUB_LOG": str(log),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'build_tools'}",
        }
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **set_here, **environment},
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
        )


def lines_of(log: Path, word: str) -> list[str]:
    return [line for line in log.read_text("utf-8").splitlines() if line.split()[0] == word]


def launches(log: Path) -> list[Launch]:
    found = []
    for line in lines_of(log, "launch"):
        _, kernel, *numbers, params = line.split()
        found.append(Launch(kernel, *map(int, numbers), bytes.fromhex(params)))
    return found


def build_stub(folder: Path) -> Stub:
    """Compiles the host library and the stub driver, and lays out kernels."""
    cxx = needs("g++")
    native.host(folder / native.HOST_LIBRARY, cxx)
    source = ROOT / "tests" / "build_tools" / "stub_driver.cpp"
    options = ["-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    output = ["-o", str(folder / "libcuda.so.1")]
    subprocess.run([cxx, *options, str(source), *output], check=True)
    stub = Stub(folder)
    lay_out_kernels(stub.kernels)
    return stub


def lay_out_kernels(folder: Path, archs: tuple[str, ...] = ("80", "90", "80+ptx")) -> None:
    """A table of every kernel of `archs`, whose files have no content but their architecture."""
    parts = [
        Part(unit, Arch.parse(arch), "", folder)
        for unit in codegen.units()
        for arch in archs
        if arch in unit.archs
    ]
    files = {part: f"{part.arch}.{part.arch.form}" for part in parts}
    folder.mkdir(exist_ok=True)
    for name in files.values():
        (folder / name).write_text(name, "utf-8")
    (folder / "index.txt").write_text(kernels.index_text(parts, files), "utf-8")
