"""The matrix of wheels: torch x CUDA x platform x architectures x C++ ABI x Python.

A combination that no rule speaks against is a cell. Most of what a cell says is in its name alone:
nothing compiled here speaks Python's C API, kernels depend on neither torch nor platform, and a
shim for each C++ ABI goes along. So a few dozen parts, built once, make every wheel.

Reading the matrix needs Python 3.11; an installation from source never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from typing import Optional

from build_tools.matrix_facts import (
    AXES,
    ArchSet,
    Cuda,
    Facts,
    Platform,
    Rule,
    Torch,
    load,
    numbers,
)
from build_tools.paths import truth
from build_tools.wheel_name import Variant, WheelName, python_tags
from build_tools.wheel_parts import HostPart, Part, Wheel, kernels, shims

RELEASE = str(truth("_version").__version__)
# The set of architectures that a name stands for unless it says otherwise.
ALL_ARCHS = "all"


class MatrixError(ValueError):
    """What cannot be had from the matrix."""


@dataclass(frozen=True)
class Cell:
    """One value of each axis, whether a rule speaks against them or not."""

    facts: Facts = field(repr=False, compare=False)
    torch: Torch
    cuda: Cuda
    platform: Platform
    archs: ArchSet
    cxx11abi: str
    python: str

    def value(self, axis: str) -> str:
        """The word for an axis."""
        value = getattr(self, axis)
        return value if isinstance(value, str) else str(value.name)

    def reasons(self) -> tuple[tuple[Rule, str], ...]:
        """The rules that speak against it, each with what there is instead; none for a cell."""
        found = [(rule, CHECKS[rule.name](self)) for rule in self.facts.rules.values()]
        return tuple((rule, instead) for rule, instead in found if instead is not None)

    def parts(self) -> tuple[Part, ...]:
        """What its wheels are made of.

        The shims of every C++ ABI, whichever the name says: installers choose between two local
        versions by their order, and cannot know which one the torch at hand has.
        """
        return (
            *kernels(self.facts, self.cuda, self.archs),
            HostPart(self.platform),
            *shims(self.facts, self.torch, self.platform),
        )

    def published(self) -> Optional[Wheel]:
        """The wheel under the name that scripts know, in the index root of its CUDA version.

        Such a name cannot tell a part of the architectures from all of them.
        """
        if self.archs.name != ALL_ARCHS:
            return None
        variant = Variant(self.cuda.name, self.torch.name, self.cxx11abi)
        name = WheelName(RELEASE, *python_tags(self.python), self.platform.name, variant)
        return self._wheel(f"cu{self.cuda.name}", name)

    def plain(self) -> Wheel:
        """The same as a plain release, in an index root that says the rest.

        Cells that differ in Python or C++ ABI share it: nothing in it depends on either.
        """
        slim = "" if self.archs.name == ALL_ARCHS else f"/{self.archs.name}"
        root = f"cu{self.cuda.name}/torch{self.torch.name}{slim}"
        return self._wheel(root, plain_name(self.platform))

    def _wheel(self, root: str, name: WheelName) -> Wheel:
        root = f"{self.facts.index}/{root}"
        return Wheel(root, name, self.parts(), self.cuda.name, self.torch.name)

    def wheels(self) -> tuple[Wheel, ...]:
        published = self.published()
        return (self.plain(),) if published is None else (published, self.plain())


def plain_name(platform: Platform) -> WheelName:
    """One file for every Python, free-threaded ones and those to come: none is bound in it."""
    return WheelName(RELEASE, "py3", "none", platform.tag)


class Matrix:
    """All combinations, and the wheels of those that are cells."""

    def __init__(self, facts: Optional[Facts] = None) -> None:
        self.facts = load() if facts is None else facts
        odd = set(self.facts.rules) ^ set(CHECKS)
        if odd:
            raise MatrixError(f"{', '.join(sorted(odd))}: a rule needs words and a function")

    @cached_property
    def combinations(self) -> tuple[Cell, ...]:
        values = [self.facts.axis(axis) for axis in AXES]
        return tuple(self.combination(*words) for words in product(*values))

    def combination(
        self, torch: str, cuda: str, platform: str, archs: str, cxx11abi: str, python: str
    ) -> Cell:
        """The combination of these words, in the order of `AXES`."""
        facts = self.facts
        return Cell(
            facts,
            facts.torch[torch],
            facts.cuda[cuda],
            facts.platform[platform],
            facts.archs[archs],
            cxx11abi,
            python,
        )

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.combinations if not cell.reasons())

    def universal(self, platform: Platform) -> Wheel:
        """The wheel of a platform for every torch, Python and CUDA."""
        facts = self.facts
        parts = [*kernels(facts, facts.universal_cuda, facts.universal_archs), HostPart(platform)]
        for torch in facts.torch.values():
            parts += shims(facts, torch, platform)
        return Wheel(facts.index, plain_name(platform), tuple(dict.fromkeys(parts)))

    @cached_property
    def by_path(self) -> dict[str, Wheel]:
        """Every wheel, once."""
        made = [self.universal(platform) for platform in self.facts.platform.values()]
        for cell in self.cells:
            made += cell.wheels()
        return {wheel.path: wheel for wheel in made}

    def wheels(self, only: Iterable[str] = ()) -> tuple[Wheel, ...]:
        """Every wheel, or those that one of the patterns fits."""
        patterns = tuple(only)
        chosen = [wheel for wheel in self.by_path.values() if fits(wheel, patterns)]
        if not chosen:
            raise MatrixError(
                f"no wheel fits {' or '.join(patterns)}; `matrix --format names` lists all, "
                "`matrix --explain --only ...` says why one is missing"
            )
        return tuple(chosen)


def fits(wheel: Wheel, patterns: tuple[str, ...]) -> bool:
    """Whether a wheel's path or file name fits one of the patterns; without any, every one does."""
    names = (wheel.path, str(wheel.name))
    return not patterns or any(fnmatchcase(name, x) for name in names for x in patterns)


def words(values: Iterable[str]) -> str:
    return ", ".join(values) or "none"


def span(values: Sequence[str]) -> str:
    """Words between commas; three or more consecutive versions by the first and the last."""
    plain = [value for value in values if value.startswith("3.") and not value.endswith("t")]
    minors = [int(value.split(".")[1]) for value in plain]
    if len(plain) < 3 or minors != list(range(minors[0], minors[0] + len(minors))):
        return words(values)
    return words([f"{plain[0]} to {plain[-1]}", *(x for x in values if x not in plain)])


# A check says None, or what there is instead of what the combination asks for.


def torch_python(cell: Cell) -> Optional[str]:
    """torch must have a wheel for that Python."""
    has = cell.torch.pythons[cell.platform.name]
    return None if cell.python in has else span(has)


def torch_cuda(cell: Cell) -> Optional[str]:
    """torch must have a build for that major version of CUDA."""
    has = cell.torch.cuda[cell.platform.name]
    return None if toolkits(cell) else words(has)


def torch_cxx11abi(cell: Cell) -> Optional[str]:
    """A torch with that C++ ABI must be in use."""
    has = cell.torch.cxx11abi[cell.platform.name]
    return None if cell.cxx11abi in has else words(has)


def torch_gpu(cell: Cell) -> Optional[str]:
    """torch's own build must run on some of the GPUs that the wheel is for.

    One that somebody else has built may run on more: it takes all architectures.
    """
    newest = max(map(numbers, toolkits(cell)), default=None)
    first = min(numbers(cell.facts.first_toolkit[arch]) for arch in cell.archs.has)
    if newest is None or newest >= first:
        return None
    built, needed = (".".join(map(str, version)) for version in (newest, first))
    return f"it is built with {built}, and they need {needed}"


def toolkits(cell: Cell) -> list[str]:
    """The toolkits of torch's own builds for the cell's major version of CUDA."""
    built = cell.torch.cuda[cell.platform.name]
    return [toolkit for toolkit in built if toolkit.split(".")[0] == cell.cuda.name]


CHECKS: dict[str, Callable[[Cell], Optional[str]]] = {
    check.__name__: check for check in (torch_python, torch_cuda, torch_cxx11abi, torch_gpu)
}
