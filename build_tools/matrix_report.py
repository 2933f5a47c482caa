"""`python -m build_tools matrix`: the matrix as a table, names, jobs, JSON, or with its reasons."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from build_tools.matrix import ALL_ARCHS, RELEASE, Cell, Matrix, MatrixError, fits, span, words
from build_tools.matrix_facts import INSTEAD, Platform, Rule
from build_tools.wheel_parts import HostPart, KernelsPart, Part, parts_of

# GitHub runs no more jobs of one matrix.
MAX_JOBS = 256

Row = tuple[str, ...]
Patterns = tuple[str, ...]


def add_parser(commands: Any) -> None:
    """The subcommand with its options."""
    parser = commands.add_parser("matrix", help="the wheels that there are, their parts and jobs")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="only wheels whose path or file name fits, e.g. '*cu12torch2.8*'; may be repeated",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), default="table")
    parser.add_argument("--explain", action="store_true", help="say why the others are not there")


def run(options: argparse.Namespace) -> int:
    matrix, only = Matrix(), tuple(options.only)
    if options.explain:
        print(explained(matrix, only))
    elif options.format == "table" and sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _print_with_rich(*support_table(matrix, only))
        print(counts(matrix, only))
    else:
        print(FORMATS[options.format](matrix, only))
    return 0


def support_table(matrix: Matrix, only: Patterns = ()) -> tuple[Row, list[Row]]:
    """(header, rows): a row for each torch that has cells."""
    cells = [cell for cell in matrix.cells if _is_asked(cell, only)]
    rows: list[Row] = []
    for torch in dict.fromkeys(cell.torch for cell in cells):
        mine = [cell for cell in cells if cell.torch is torch]
        gpus = []
        for cuda in matrix.facts.cuda:
            slim = [c for c in mine if c.cuda.name == cuda and c.archs.name != ALL_ARCHS]
            gpus.append(_by_platform(matrix, slim, "archs"))
        pythons, abis = (_by_platform(matrix, mine, axis) for axis in ("python", "cxx11abi"))
        rows.append((torch.name, pythons, *gpus, abis))
    header = ("torch", "Python", *(f"CUDA {cuda}" for cuda in matrix.facts.cuda), "cxx11abi")
    return header, rows


def _is_asked(cell: Cell, only: Patterns) -> bool:
    return not only or any(fits(wheel, only) for wheel in cell.wheels())


def _by_platform(matrix: Matrix, cells: list[Cell], axis: str) -> str:
    """The values of an axis among cells, and where, unless on every platform."""
    groups: dict[Row, list[str]] = {}
    for value in matrix.facts.axis(axis):
        found = {cell.platform.name for cell in cells if cell.value(axis) == value}
        platforms = tuple(name for name in matrix.facts.platform if name in found)
        groups.setdefault(platforms, []).append(value)
    groups.pop((), None)
    texts = []
    for platforms, values in groups.items():
        is_everywhere = platforms == tuple(matrix.facts.platform)
        texts.append(span(values) + ("" if is_everywhere else f" on {words(platforms)}"))
    return "; ".join(texts) or "-"


def archs_table(matrix: Matrix) -> tuple[Row, list[Row]]:
    """(header, rows): the sets of architectures."""
    sets = matrix.facts.archs.values()
    rows: list[Row] = [(f"`{x.name}`", words(x.has), x.gpus) for x in sets]
    return ("Set", "Architectures", "GPUs"), rows


def rules_table(matrix: Matrix) -> tuple[Row, list[Row]]:
    """(header, rows): what can speak against a combination, and how that is known."""
    rows: list[Row] = []
    for rule in matrix.facts.rules.values():
        blanks = dict.fromkeys((*rule.axes, INSTEAD), "...")
        rows.append((rule.reason.format(**blanks), "; ".join(rule.sources)))
    return ("Reason", "Known from"), rows


def table_text(matrix: Matrix, only: Patterns = ()) -> str:
    header, rows = support_table(matrix, only)
    if not rows:
        return counts(matrix, only)
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = (header, tuple("-" * width for width in widths), *rows)
    texts = ("  ".join(x.ljust(w) for x, w in zip(line, widths)).rstrip() for line in lines)
    return "\n".join((*texts, "", counts(matrix, only)))


def counts(matrix: Matrix, only: Patterns = ()) -> str:
    wheels = matrix.wheels(only)
    published = sum(wheel.name.variant is not None for wheel in wheels)
    universal = sum(wheel.torch is None for wheel in wheels)
    return (
        f"{len(wheels)} wheels of {len(parts_of(wheels))} parts: {universal} universal, "
        f"{published} under published names, {len(wheels) - published - universal} plain in index "
        "roots of their own"
    )


def _print_with_rich(header: Row, rows: Iterable[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def names_text(matrix: Matrix, only: Patterns = ()) -> str:
    return "\n".join(wheel.path for wheel in matrix.wheels(only))


def job(part: Part) -> dict[str, str]:
    """A part as a row of GitHub's `strategy.matrix`."""
    return {"part": part.name, "runner": part.platform.runner, **part.needs}


def github_text(matrix: Matrix, only: Patterns = ()) -> str:
    """One line for `fromJSON`: a job for each part of kernels, then one for each platform.

    Host library and shims of a platform share a container, and wheels are put together in seconds.
    """
    parts = parts_of(matrix.wheels(only))
    kernels = [job(part) for part in parts if isinstance(part, KernelsPart)]
    platforms = [platform_job(part.platform) for part in parts if isinstance(part, HostPart)]
    count = max(len(kernels), len(platforms))
    if count > MAX_JOBS:
        raise MatrixError(f"{count} jobs; GitHub runs {MAX_JOBS} of one matrix: use --only")
    return json.dumps({"kernels": {"include": kernels}, "platforms": {"include": platforms}})


def platform_job(platform: Platform) -> dict[str, str]:
    """A platform as a row of GitHub's `strategy.matrix`; `wheels` is what `build --only` takes."""
    machine = platform.name.partition("_")[2]
    return {"platform": platform.name, "runner": platform.runner, "wheels": f"*_{machine}.whl"}


def json_text(matrix: Matrix, only: Patterns = ()) -> str:
    wheels = matrix.wheels(only)
    rows = [
        {
            "path": wheel.path,
            "version": wheel.name.version,
            "tag": wheel.name.tag,
            "cuda": wheel.cuda,
            "torch": wheel.torch,
            "parts": [part.name for part in wheel.parts],
        }
        for wheel in wheels
    ]
    parts = [job(part) for part in parts_of(wheels)]
    return json.dumps({"release": RELEASE, "wheels": rows, "parts": parts}, indent=1)


def explained(matrix: Matrix, only: Patterns = ()) -> str:
    """Why combinations are no cells; reasons that are alike in one line."""
    asked = {cell: dict(cell.reasons()) for cell in matrix.combinations if _is_asked(cell, only)}
    if not asked:
        raise MatrixError(f"no combination fits {' or '.join(only)}")
    good = sum(not reasons for reasons in asked.values())
    lines = [f"{good} of {len(asked)} combinations are cells."]
    for rule in matrix.facts.rules.values():
        against = {cell: reasons[rule] for cell, reasons in asked.items() if rule in reasons}
        if against:
            lines += ["", f"{rule.name} speaks against {len(against)}:"]
            lines += [f"  {line}" for line in _merged(matrix, rule, against)]
            lines += [f"  known from: {source}" for source in rule.sources]
    return "\n".join(lines)


def _merged(matrix: Matrix, rule: Rule, against: dict[Cell, str]) -> list[str]:
    """A rule's reasons; those that differ in one axis alone become one, from the last axis on."""
    axes = [matrix.facts.axis(axis) for axis in rule.axes]
    rows: set[tuple[Row, ...]] = {
        tuple((word,) for word in (*map(cell.value, rule.axes), instead))
        for cell, instead in against.items()
    }
    for place in range(len(axes) - 1, 0, -1):
        alike: dict[tuple[Row, ...], set[str]] = {}
        for row in rows:
            alike.setdefault(row[:place] + row[place + 1 :], set()).update(row[place])
        rows = {
            (*rest[:place], tuple(sorted(values, key=axes[place].index)), *rest[place:])
            for rest, values in alike.items()
        }
    in_order = sorted(rows, key=lambda row: [axis.index(x[0]) for axis, x in zip(axes, row)])
    return [_reason(matrix, rule, row) for row in in_order]


def _reason(matrix: Matrix, rule: Rule, row: tuple[Row, ...]) -> str:
    named = {axis: span(values) for axis, values in zip(rule.axes, row)}
    if named.get("platform") == words(matrix.facts.platform):
        named["platform"] = "any platform"
    return rule.reason.format(**named, **{INSTEAD: row[-1][0]})


FORMATS: dict[str, Callable[[Matrix, Patterns], str]] = {
    "table": table_text,
    "names": names_text,
    "github": github_text,
    "json": json_text,
}
