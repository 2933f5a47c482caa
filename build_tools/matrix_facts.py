"""Reads matrix.toml into typed facts, and refuses what does not fit together."""

from __future__ import annotations

import importlib
import importlib.util
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from build_tools.arch import Arch
from build_tools.paths import support
from build_tools.toml_table import Table, TableError

FILE = Path(__file__).with_name("matrix.toml")
AXES = ("torch", "cuda", "platform", "archs", "cxx11abi", "python")
# What a reason may speak of besides the axes: what there is instead.
INSTEAD = "has"

ByPlatform = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Cuda:
    """A major version of CUDA: the compiler that makes its kernels."""

    name: str
    toolkit: str
    nvrtc: str


@dataclass(frozen=True)
class Platform:
    """Where a wheel runs: `name` as published names spell it, `tag` as plain ones do."""

    name: str
    tag: str
    has_cxx11abi: bool
    runner: str


@dataclass(frozen=True)
class ArchSet:
    """Architectures that one wheel carries."""

    name: str
    has: tuple[str, ...]
    gpus: str


@dataclass(frozen=True)
class Torch:
    """A minor version of torch: what its own wheels are for, by platform."""

    name: str
    release: str
    pythons: ByPlatform = field(hash=False)
    cuda: ByPlatform = field(hash=False)
    cxx11abi: ByPlatform = field(hash=False)


@dataclass(frozen=True)
class Rule:
    """A rule's words; `axes` are those that the reason names, in its order."""

    name: str
    reason: str
    axes: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Everything that matrix.toml says."""

    index: str
    kernels_on: Platform
    headers_from: Platform
    pythons: tuple[str, ...]
    cxx11abi: tuple[str, ...]
    cuda: Mapping[str, Cuda]
    platform: Mapping[str, Platform]
    archs: Mapping[str, ArchSet]
    torch: Mapping[str, Torch]
    first_toolkit: Mapping[str, str]
    universal_cuda: Cuda
    universal_archs: ArchSet
    stable_since: str
    rules: Mapping[str, Rule]

    def axis(self, name: str) -> tuple[str, ...]:
        """The values of an axis, in the file's order."""
        lists = {"python": self.pythons, "cxx11abi": self.cxx11abi}
        return lists[name] if name in lists else tuple(getattr(self, name))

    def platform_of(self, tag: str) -> Platform:
        """The platform that a wheel's file name ends with; ValueError if it is none of these."""
        for platform in self.platform.values():
            if tag in (platform.tag, platform.name):
                return platform
        raise ValueError(f"{tag} is no platform of the matrix")


def numbers(version: str) -> tuple[int, ...]:
    """2.10 as (2, 10), for comparing."""
    return tuple(map(int, version.split(".")))


def kernel_archs() -> tuple[str, ...]:
    """Every architecture of the kernel table, in order."""
    archs = {Arch.parse(arch) for row in support.KERNEL_FAMILIES for arch in row.archs}
    return tuple(map(str, sorted(archs)))


@cache
def load(file: Path = FILE) -> Facts:
    """The facts; TableError says in which table what is wrong."""
    top = Table(_parse(file), file.name)
    pythons, cxx11abi = top.texts("pythons"), top.texts("cxx11abi")
    platform = {table.name: _platform(table) for table in top.tables("platform")}
    cuda = {table.name: _cuda(table) for table in top.tables("cuda")}
    archs = {table.name: _archs(table) for table in top.tables("archs")}
    sources = top.table("sources").all_texts()
    universal, stable = top.table("universal"), top.table("stable_abi")
    facts = Facts(
        index=top.text("index"),
        kernels_on=platform[top.text("kernels_on", known=platform)],
        headers_from=platform[top.text("headers_from", known=platform)],
        pythons=pythons,
        cxx11abi=cxx11abi,
        cuda=cuda,
        platform=platform,
        archs=archs,
        torch={
            table.name: _torch(table, tuple(platform), pythons, cxx11abi)
            for table in top.tables("torch")
        },
        first_toolkit=_first_toolkit(top.table("first_toolkit")),
        universal_cuda=cuda[universal.text("cuda", known=cuda)],
        universal_archs=archs[universal.text("archs", known=archs)],
        stable_since=stable.text("since"),
        rules={table.name: _rule(table, sources) for table in top.tables("rules")},
    )
    for table in (universal, stable, top):
        table.end()
    return facts


def _parse(file: Path) -> dict[str, Any]:
    reader = _toml()
    try:
        return dict(reader.loads(file.read_text("utf-8")))
    except OSError as error:
        raise TableError(f"{file.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TableError(f"{file.name} is no TOML: {error}") from None


def _toml() -> ModuleType:
    """Python's own reader, of 3.11; before that the one that pytest brings along."""
    for name in ("tomllib", "tomli"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise TableError(f"reading {FILE.name} needs Python 3.11 or later, or `pip install tomli`")


def _platform(table: Table) -> Platform:
    made = Platform(table.name, table.text("tag"), table.flag("has_cxx11abi"), table.text("runner"))
    table.end()
    return made


def _cuda(table: Table) -> Cuda:
    made = Cuda(table.name, table.text("toolkit"), table.text("nvrtc"))
    if not made.toolkit.startswith(f"{made.name}."):
        raise table.error("toolkit", f"is {made.toolkit!r}; it must be a CUDA {made.name}")
    if f"=={made.toolkit}." not in made.nvrtc:
        raise table.error("nvrtc", f"is {made.nvrtc!r}; it must pin a release of {made.toolkit}")
    table.end()
    return made


def _archs(table: Table) -> ArchSet:
    made = ArchSet(table.name, table.texts("has", known=kernel_archs()), table.text("gpus"))
    table.end()
    return made


def _torch(
    table: Table, platforms: tuple[str, ...], pythons: tuple[str, ...], cxx11abi: tuple[str, ...]
) -> Torch:
    made = Torch(
        table.name,
        table.text("release"),
        _by_platform(table, "pythons", platforms, pythons),
        _by_platform(table, "cuda", platforms),
        _by_platform(table, "cxx11abi", platforms, cxx11abi),
    )
    if not made.release.startswith(f"{made.name}."):
        raise table.error("release", f"is {made.release!r}; it must be a torch {made.name}")
    table.end()
    return made


def _by_platform(
    table: Table, key: str, platforms: tuple[str, ...], known: tuple[str, ...] = ()
) -> ByPlatform:
    if table.is_list(key):
        return dict.fromkeys(platforms, table.texts(key, known))
    inner = table.table(key)
    lists = {platform: inner.texts(platform, known) for platform in platforms}
    inner.end()
    return lists


def _first_toolkit(table: Table) -> Mapping[str, str]:
    first = {arch: table.text(arch) for arch in kernel_archs()}
    table.end()
    return first


def _rule(table: Table, sources: Mapping[str, str]) -> Rule:
    reason = table.text("reason")
    try:
        named = [word for _, word, _, _ in string.Formatter().parse(reason) if word is not None]
    except ValueError as error:
        raise table.error("reason", f"is no template: {error}") from None
    for word in named:
        if word not in (*AXES, INSTEAD):
            raise table.error("reason", f"speaks of {{{word}}}; there is {', '.join(AXES)}")
    cited = tuple(sources[key] for key in table.texts("sources", known=sources))
    table.end()
    return Rule(table.name, reason, tuple(x for x in named if x != INSTEAD), cited)
