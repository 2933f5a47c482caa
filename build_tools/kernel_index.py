"""The table of kernels, index.txt, as rows: read, put together from several, written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from build_tools.arch import Arch
from build_tools.codegen import units
from build_tools.kernels import HEADER

FILE = "index.txt"


class Row(NamedTuple):
    """An image of a kernel; csrc/host/registry.cpp reads the same words."""

    kind: str
    family: str
    head_dim: str
    dtype: str
    number: str
    form: str
    symbol: str
    file: str

    @property
    def arch(self) -> Arch:
        arch = Arch.parse(self.number)
        return Arch(arch.number, arch.suffix, self.form == "ptx")


def parse(text: str) -> list[Row]:
    """The rows of a table; ValueError says which line is none."""
    header, *lines = text.splitlines() or [""]
    if header != HEADER:
        raise ValueError(f"{FILE} does not begin with {HEADER!r}")
    rows = []
    for number, line in enumerate(lines, 2):
        words = line.split()
        if len(words) != len(Row._fields):
            raise ValueError(f"{FILE}, line {number}: a row has {len(Row._fields)} words")
        rows.append(Row(*words))
    return rows


def archs(rows: Iterable[Row]) -> list[Arch]:
    """What the images are for, in order."""
    return sorted({row.arch for row in rows})


def render(rows: Iterable[Row]) -> str:
    return "\n".join([HEADER, *(" ".join(row) for row in rows)]) + "\n"


def merged(tables: Iterable[list[Row]]) -> list[Row]:
    """One table of several, in the order of the kernel table: the first that fits is taken."""
    order = {unit.symbol: (place, unit.archs) for place, unit in enumerate(units())}

    def key(row: Row) -> tuple[int, int]:
        place, has = order[row.symbol]
        return place, has.index(str(row.arch))

    rows = [row for table in tables for row in table]
    strange = [row.symbol for row in rows if row.symbol not in order]
    if strange:
        raise ValueError(f"{strange[0]} is not in the kernel table: parts of other sources")
    return sorted(rows, key=key)
