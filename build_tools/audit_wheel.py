"""A wheel under audit, and what a rule may say of it."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path

from build_tools import elf, kernel_index
from build_tools.assemble import INDEX, SBOM, split
from build_tools.fetch import TorchLibraries
from build_tools.make_parts import STORE
from build_tools.matrix import Matrix
from build_tools.matrix_facts import Platform, numbers
from build_tools.matrix_facts import Torch as TorchFacts
from build_tools.sbom import Piece, pieces_of
from build_tools.wheel_name import WheelName
from build_tools.zip_file import DAMAGE, DateTime, Entries, read


class Broken(Exception):
    """What a wheel has and should not have, or the reverse."""


class Skipped(Exception):
    """Why a rule cannot be told here."""


@dataclass(frozen=True)
class Context:
    """What a wheel is compared with.

    Args:
        torches: whose libraries are at hand.
        parts: the folder where parts stand.
    """

    matrix: Matrix = field(default_factory=Matrix)
    torches: tuple[TorchLibraries, ...] = ()
    parts: Path = STORE


@dataclass(frozen=True)
class AuditedWheel:
    """A file that should be a wheel; what cannot be read of it breaks the rule that asks for it."""

    path: Path

    @cached_property
    def _zip(self) -> tuple[Entries, list[DateTime]]:
        try:
            with zipfile.ZipFile(self.path) as opened:
                return read(opened), [info.date_time for info in opened.infolist()]
        except (OSError, *DAMAGE) as error:
            raise Broken(f"it cannot be read: {error}") from None

    @property
    def is_readable(self) -> bool:
        """Whether it is a zip file."""
        try:
            return bool(self.entries)
        except Broken:
            return False

    @property
    def entries(self) -> Entries:
        return self._zip[0]

    @property
    def times(self) -> list[DateTime]:
        return self._zip[1]

    @cached_property
    def name(self) -> WheelName:
        try:
            return WheelName.parse(self.path.name)
        except ValueError as error:
            raise Broken(str(error)) from None

    @cached_property
    def _split(self) -> tuple[Entries, Entries]:
        return split(self.entries)

    @property
    def modules(self) -> Entries:
        """Everything but dist-info."""
        return self._split[0]

    @property
    def info(self) -> Entries:
        """dist-info, by names below it."""
        return self._split[1]

    def info_text(self, name: str) -> str:
        """A file of dist-info."""
        if name not in self.info:
            raise Broken(f"there is no {name} in its dist-info")
        return self.info[name].data.decode()

    @cached_property
    def metadata(self) -> Message:
        return HeaderParser().parsestr(self.info_text("METADATA"))

    @property
    def torch_requirement(self) -> str:
        """What follows "torch" in METADATA, e.g. "==2.8.*"."""
        lines = [str(x) for x in self.metadata.get_all("Requires-Dist", [])]
        torches = [x for x in lines if x.startswith("torch") and x[5:6] in ("", *"=<>!~ ")]
        if len(torches) != 1:
            raise Broken(f"METADATA requires torch {len(torches)} times")
        return torches[0].removeprefix("torch").strip()

    @cached_property
    def pieces(self) -> list[Piece]:
        try:
            return pieces_of(self.info_text(SBOM))
        except ValueError as error:
            raise Broken(str(error)) from None

    @cached_property
    def libraries(self) -> dict[str, elf.Elf]:
        """Its shared libraries, by their names without a folder."""
        if self.name.platform.startswith("win"):
            raise Skipped("libraries of Windows are not read here")
        files = {x: y for x, y in self.modules.items() if ".so" in x.rpartition("/")[2]}
        if not files:
            raise Broken("it has no shared library")
        return {name.rpartition("/")[2]: _read(name, y.data) for name, y in files.items()}

    @property
    def shims(self) -> dict[str, elf.Elf]:
        return {name: x for name, x in self.libraries.items() if name.startswith("_shim_")}

    @cached_property
    def index(self) -> list[kernel_index.Row]:
        """The table of kernels."""
        if INDEX not in self.modules:
            raise Broken(f"there is no {INDEX}")
        try:
            return kernel_index.parse(self.modules[INDEX].data.decode())
        except ValueError as error:
            raise Broken(str(error)) from None

    @property
    def images(self) -> Entries:
        """The compiled kernels, by the names that the table has for them."""
        folder = INDEX.removesuffix(kernel_index.FILE)
        files = self.modules.items()
        return {x.removeprefix(folder): y for x, y in files if x.startswith(folder) and x != INDEX}

    def platform(self, matrix: Matrix) -> Platform:
        """The platform that its name says."""
        try:
            return matrix.facts.platform_of(self.name.platform)
        except ValueError as error:
            raise Broken(str(error)) from None

    def claimed_torches(self, matrix: Matrix) -> list[TorchFacts]:
        """The torches of the matrix that METADATA lets it be installed with.

        None, if it asks for anything but one minor version or all from one on.
        """
        requirement = self.torch_requirement
        torches = matrix.facts.torch.values()
        if requirement.startswith("==") and requirement.endswith(".*"):
            return [torch for torch in torches if torch.name == requirement[2:-2]]
        if requirement.startswith(">="):
            oldest = numbers(requirement[2:])
            return [torch for torch in torches if numbers(torch.name) >= oldest]
        return []


def _read(name: str, data: bytes) -> elf.Elf:
    try:
        return elf.read(data)
    except elf.ElfError as error:
        raise Broken(f"{name}: {error}") from None
