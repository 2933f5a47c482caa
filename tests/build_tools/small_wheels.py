"""A wheel factory small enough for tests: real kernels, but few; stand-ins for the shims of torches
that are not here.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from native_tools import codegen, kernels, native, needs

from build_tools import compilers, fetch, kernel_index, make_parts, ninja
from build_tools.__main__ import main
from build_tools.matrix import Matrix
from build_tools.matrix_facts import numbers
from build_tools.wheel_parts import ShimPart, Wheel

MATRIX = Matrix()
# One for each architecture at least: 90a has kernels of Hopper's own alone.
HOPPER = "flash_fwd_sm90_wide_d64_fp16"
FEW = [unit for unit in codegen.units() if unit.kind == "delta" or unit.symbol == HOPPER]
# The torch here, whose shim is a real one.
HERE = native.find_torch()
TORCH = "{}.{}".format(*HERE.version)


@dataclass(frozen=True)
class Factory:
    """Where parts stand and wheels go."""

    folder: Path

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    def build(self, *only: str, to: str = "out") -> list[Path]:
        """The wheels that fit, built by the command."""
        words = [word for pattern in only for word in ("--only", pattern)]
        target = self.folder / to
        assert main(["build", *words, "--parts", str(self.parts), "--to", str(target)]) == 0
        return [target / wheel.path for pattern in only for wheel in MATRIX.wheels([pattern])]


@contextmanager
def running(folder: Path) -> Iterator[Factory]:
    """A factory that compiles what is in `FEW`, and fetches nothing."""
    try:
        nvrtc = compilers.find_nvrtc()
        ninja.find_ninja()
    except (FileNotFoundError, ninja.BuildError) as error:
        pytest.skip(str(error))
    factory = Factory(folder)
    with pytest.MonkeyPatch.context() as patch:
        for module in (codegen, kernels, kernel_index, make_parts):
            patch.setattr(module, "units", lambda: FEW)
        patch.setattr(kernels, "PARTS", folder / "images")
        patch.setattr(fetch, "nvrtc", lambda cuda: nvrtc)
        patch.setattr(fetch, "torch_headers", lambda release, platform: HERE.include)
        for part in universal().parts:
            if isinstance(part, ShimPart) and not (factory.parts / part.name).exists():
                stand_in(part, factory.parts)
        yield factory


def universal() -> Wheel:
    """The universal wheel of this machine's platform."""
    return MATRIX.universal(MATRIX.facts.platform[platform()])


def platform() -> str:
    """What is compiled for here; the test is skipped where nothing is, or there are no wheels."""
    needs("g++")
    found = make_parts.platform_of_compiler()
    return found if found in MATRIX.facts.platform else pytest.skip(f"no wheels for {found}")


def stand_in(part: ShimPart, store: Path) -> None:
    """Puts a shim that does nothing in the place of one for a torch that is not here."""
    version = numbers(part.headers)[:2]
    if native.shim_file(version, True) == native.shim_file(HERE.version, True):
        return
    folder = store / part.name
    folder.mkdir(parents=True)
    one = store.parent / "stand_in.so"
    if not one.exists():
        options = ["-shared", "-nostdlib", "-x", "c", "/dev/null", "-o", str(one)]
        subprocess.run([needs("g++"), *options], check=True)
    shutil.copyfile(one, folder / native.shim_file(version, part.cxx11abi != "FALSE"))
    make_parts.label(folder, make_parts.digest_of(part), {"torch": part.serves})
