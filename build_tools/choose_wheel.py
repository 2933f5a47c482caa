"""Which wheel of a mirror serves an environment, and what speaks against each other one.

The same rules as in matrix.py, for an environment instead of a combination. Standard library only:
an installation from source asks here, on every supported Python.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Optional

from build_tools.arch import Arch
from build_tools.kernels import serving
from build_tools.manifest import EVERY_CUDA, OLDEST_TORCH, Entry
from build_tools.wheel_name import python_tags

_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_(\w+)")


@dataclass(frozen=True)
class Wanted:
    """What a mirror shall serve: values of each axis, all of them where none is named."""

    platforms: tuple[str, ...] = ()
    cuda: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ()
    torches: tuple[str, ...] = ()

    def takes(self, entry: Entry) -> bool:
        """Whether a wheel serves one of the values of every axis."""
        torches = [torch for torch in self.torches if _torch_reason(entry, numbers(torch)) is None]
        pythons = [python for python in self.pythons if serves_python(entry, python)]
        return (
            (not self.torches or bool(torches))
            and (not self.pythons or bool(pythons))
            and (not self.cuda or not entry.cuda or bool({*self.cuda} & {*entry.cuda}))
            and (not self.platforms or bool({*self.platforms, "any"} & platforms_of(entry)))
        )

    def __str__(self) -> str:
        axes = {"platform": self.platforms, "CUDA": self.cuda, "Python": self.pythons}
        named = {**axes, "torch": self.torches}
        return "".join(f", {name} {' or '.join(x)}" for name, x in named.items() if x)


@dataclass(frozen=True)
class TorchHere:
    """The torch of an environment.

    Args:
        cuda: the version of CUDA that it is built for, if any.
        folder: where it stands.
    """

    version: str
    cuda: Optional[str]
    folder: str = ""

    @property
    def minor(self) -> tuple[int, ...]:
        """Major and minor version; ValueError if the version does not begin with them."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        if found is None:
            raise ValueError(
                f"the torch in {self.folder} says that its version is {self.version!r}; install "
                "torch again"
            )
        return int(found[1]), int(found[2])

    def __str__(self) -> str:
        cuda = f"for CUDA {self.cuda}" if self.cuda else "without CUDA"
        return f"torch {self.version} {cuda}" + (f" in {self.folder}" if self.folder else "")


@dataclass(frozen=True)
class Here:
    """What a wheel has to serve.

    Args:
        version: of the sources.
        python: as in `3.12` or `3.13t`.
        platform: as in `linux_x86_64`.
        glibc: its version; None where there is another C library.
        torch: None where none is found.
        gpus: architectures to serve: asked for, or of the GPUs here.
    """

    version: str
    python: str
    platform: str
    glibc: Optional[tuple[int, ...]]
    torch: Optional[TorchHere]
    gpus: tuple[Arch, ...] = ()

    def __str__(self) -> str:
        gpus = f", GPUs of {', '.join(map(str, self.gpus))}" if self.gpus else ""
        return f"Python {self.python}, {self.platform}, {self.torch or 'no torch'}{gpus}"


def here(version: str, torch: Optional[TorchHere], gpus: Iterable[Arch] = ()) -> Here:
    """This process's environment."""
    is_free = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    python = f"{sys.version_info.major}.{sys.version_info.minor}{'t' if is_free else ''}"
    name = re.sub(r"[-.]", "_", sysconfig.get_platform())
    return Here(version, python, name, _glibc(), torch, tuple(gpus))


def _glibc() -> Optional[tuple[int, ...]]:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, OSError, ValueError):
        return None
    return numbers(version) if name == "glibc" and platform.system() == "Linux" else None


def numbers(version: str) -> tuple[int, ...]:
    """2.10 as (2, 10), for comparing."""
    try:
        return tuple(map(int, version.split(".")))
    except ValueError:
        raise ValueError(f"{version!r} is no version; one is written like 2.8") from None


@dataclass(frozen=True)
class Choice:
    """What an environment may take.

    Args:
        best: the wheel that serves it and any other torch too; None if there is none.
        bound: wheels that serve it, and its minor version of torch alone.
        against: a line for each wheel that does not serve it, the nearest first.
    """

    best: Optional[Entry]
    bound: tuple[Entry, ...]
    against: tuple[str, ...]


def choose(entries: Iterable[Entry], wanted: Here) -> Choice:
    """The wheels that serve an environment, and why others do not.

    Installers keep what was made of a source archive and give it to the next environment, whatever
    torch that one has. So the best is never one that is bound to a torch.
    """
    told = {entry: reasons(entry, wanted) for entry in entries}
    fitting = [entry for entry, why in told.items() if not why]
    free = [entry for entry in fitting if entry.torch is None]
    bound = sorted((x for x in fitting if x.torch is not None), key=_widest)
    refused = sorted((x for x in told if told[x]), key=lambda x: (len(told[x]), x.path))
    return Choice(
        min(free, key=_widest, default=None),
        tuple(bound),
        tuple(f"{entry.path}: {'; '.join(told[entry])}" for entry in refused),
    )


def _widest(entry: Entry) -> tuple[int, str]:
    return -len(entry.archs), entry.path


def reasons(entry: Entry, wanted: Here) -> list[str]:
    """What speaks against a wheel; empty if it serves."""
    found = [
        _kernels_reason(entry, wanted),
        _platform_reason(entry, wanted),
        None if serves_python(entry, wanted.python) else f"for Python {'/'.join(entry.tags)}",
        _torch_here_reason(entry, wanted),
        _cuda_reason(entry, wanted),
        None
        if entry.version == wanted.version
        else f"version {entry.version}; these sources are {wanted.version}",
    ]
    return [reason for reason in found if reason]


def _kernels_reason(entry: Entry, wanted: Here) -> Optional[str]:
    if not entry.archs:
        return "has no kernels"
    has = [Arch.parse(arch) for arch in entry.archs]
    unserved = [str(gpu) for gpu in wanted.gpus if serving(gpu, has) is None]
    if unserved:
        return f"has kernels for {', '.join(entry.archs)}, none that run on {', '.join(unserved)}"
    return None


def _platform_reason(entry: Entry, wanted: Here) -> Optional[str]:
    if not {wanted.platform, "any"} & platforms_of(entry):
        return f"for {', '.join(sorted(platforms_of(entry)))}"
    for tag in entry.tags:
        found = _MANYLINUX.fullmatch(tag.rsplit("-", 1)[-1])
        if found and wanted.glibc is None:
            return "needs glibc, which is not the C library here"
        if found and wanted.glibc and wanted.glibc < (int(found[1]), int(found[2])):
            has = ".".join(map(str, wanted.glibc))
            return f"needs glibc {found[1]}.{found[2]}; here it is {has}"
    return None


def platforms_of(entry: Entry) -> set[str]:
    """Platforms of a wheel, without the versions of manylinux."""
    tags = (tag.rsplit("-", 1)[-1] for tag in entry.tags)
    return {re.sub(r"^manylinux(?:\d{4}|_\d+_\d+|1)_", "linux_", tag) for tag in tags}


def serves_python(entry: Entry, python: str) -> bool:
    """Whether a wheel's tags have a Python, written as in `3.13t`."""
    pairs = {tuple(tag.split("-")[:2]) for tag in entry.tags}
    return bool(pairs & {("py3", "none"), python_tags(python)})


def _torch_here_reason(entry: Entry, wanted: Here) -> Optional[str]:
    if wanted.torch is not None:
        return _torch_reason(entry, wanted.torch.minor)
    return f"for torch {entry.torch}; none is found here" if entry.torch is not None else None


def _torch_reason(entry: Entry, minor: tuple[int, ...]) -> Optional[str]:
    if entry.torch is not None:
        return None if numbers(entry.torch) == minor else f"for torch {entry.torch}"
    oldest = numbers(OLDEST_TORCH)
    # torch keeps its stable ABI within a major version.
    if oldest <= minor < (oldest[0] + 1,):
        return None
    return f"for torch {OLDEST_TORCH} and later 2.x"


def _cuda_reason(entry: Entry, wanted: Here) -> Optional[str]:
    cuda = wanted.torch.cuda if wanted.torch else None
    if cuda is None:
        # A torch without CUDA runs the CPU code, which every wheel has.
        return None
    if cuda.split(".")[0] in entry.cuda:
        return None
    return f"for CUDA {' and '.join(entry.cuda or EVERY_CUDA)}; torch here is for {cuda}"
