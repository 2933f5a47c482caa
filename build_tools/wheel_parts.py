"""What wheels are made of: parts that are built once and put into many of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Optional, Union

from build_tools.arch import Arch
from build_tools.matrix_facts import ArchSet, Cuda, Facts, Platform, Torch, numbers
from build_tools.wheel_name import PROJECT, WheelName

_VERSION_LINE = re.compile(r"^Version: .*$", re.MULTILINE)
_TORCH_LINE = re.compile(r"^Requires-Dist: torch(?![\w.-]).*$", re.MULTILINE)


@dataclass(frozen=True)
class KernelsPart:
    """Every kernel for one architecture; `platform` builds it, for all of them and every torch."""

    cuda: Cuda
    arch: str
    platform: Platform

    @property
    def name(self) -> str:
        return f"kernels-cu{self.cuda.name}-{Arch.parse(self.arch).flag}"

    @property
    def needs(self) -> dict[str, str]:
        """What a job must know to build it."""
        return {"kind": "kernels", "arch": self.arch, "nvrtc": self.cuda.nvrtc}


@dataclass(frozen=True)
class HostPart:
    """The host library of a platform."""

    platform: Platform

    @property
    def name(self) -> str:
        return f"host-{self.platform.name}"

    @property
    def needs(self) -> dict[str, str]:
        """What a job must know to build it."""
        return {"kind": "host", "platform": self.platform.name}


@dataclass(frozen=True)
class ShimPart:
    """A torch shim.

    Args:
        serves: `stable`, or the one minor version of torch that it is for.
        headers: the release of torch whose headers it is compiled with.
        cxx11abi: the C++ ABI, empty where there is but one.
    """

    platform: Platform
    serves: str
    headers: str
    cxx11abi: str = ""

    @property
    def name(self) -> str:
        abi = f"-cxx11abi{self.cxx11abi}" if self.cxx11abi else ""
        return f"shim-{self.platform.name}-{self.serves}{abi}"

    @property
    def needs(self) -> dict[str, str]:
        """What a job must know to build it."""
        return {
            "kind": "shim",
            "platform": self.platform.name,
            "torch": self.headers,
            "cxx11abi": self.cxx11abi,
        }


Part = Union[KernelsPart, HostPart, ShimPart]


def kernels(facts: Facts, cuda: Cuda, archs: ArchSet) -> tuple[Part, ...]:
    """The kernels of a set of architectures."""
    return tuple(KernelsPart(cuda, arch, facts.kernels_on) for arch in archs.has)


def shims(facts: Facts, torch: Torch, platform: Platform) -> tuple[ShimPart, ...]:
    """The shims that serve a torch on a platform, one for each C++ ABI it is met with."""
    if numbers(torch.name) >= numbers(facts.stable_since):
        return (ShimPart(platform, "stable", facts.torch[facts.stable_since].release),)
    abis = torch.cxx11abi[platform.name] if platform.has_cxx11abi else ("",)
    serves = f"torch{torch.name}"
    return tuple(ShimPart(platform, serves, torch.release, abi) for abi in abis)


@dataclass(frozen=True)
class Wheel:
    """A file of the index: where it stands, what it is made of, what it is for.

    Args:
        root: of an index, relative to where the files are served.
        cuda: the major version it is for; None for all.
        torch: the minor version it asks for; None leaves the package's own requirement alone.
    """

    root: str
    name: WheelName
    parts: tuple[Part, ...]
    cuda: Optional[str] = None
    torch: Optional[str] = None

    @property
    def path(self) -> str:
        """Where it stands, relative to where the files are served."""
        return f"{self.root}/{PROJECT}/{self.name}"

    def stamp(self, metadata: str) -> str:
        """The package's METADATA with this wheel's version and torch.

        pip refuses a wheel of an index whose METADATA and file name differ in the version.
        """
        head, end, text = metadata.partition("\n\n")
        head, versions = _VERSION_LINE.subn(f"Version: {self.name.version}", head)
        requirements = 1
        if self.torch is not None:
            head, requirements = _TORCH_LINE.subn(f"Requires-Dist: torch=={self.torch}.*", head)
        if (versions, requirements) != (1, 1):
            raise ValueError("METADATA must have one version and one requirement of torch")
        return head + end + text


def parts_of(wheels: Iterable[Wheel]) -> tuple[Part, ...]:
    """Every part that some of the wheels need, once."""
    return tuple(dict.fromkeys(part for wheel in wheels for part in wheel.parts))
