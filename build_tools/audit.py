"""`python -m build_tools audit`: what a wheel must be before anybody gets it.

A rule is a function by its own name, in audit_files.py, audit_native.py or audit_tools.py. Each
tells in a line what it saw; one that is broken makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import assemble, audit_files, audit_native, audit_tools, fetch
from build_tools.audit_wheel import AuditedWheel, Broken, Context, Skipped
from build_tools.matrix import Matrix

Rule = Callable[[AuditedWheel, Context], str]
RULES: tuple[Rule, ...] = (*audit_files.RULES, *audit_native.RULES, *audit_tools.RULES)
# The name of the rule before all others.
READABLE = "readable"
OK, BROKEN, SKIPPED = "ok", "BROKEN", "skipped"


@dataclass(frozen=True)
class Result:
    """What a rule said of a wheel."""

    rule: str
    state: str
    told: str


def audit(wheel: AuditedWheel, context: Context) -> list[Result]:
    """What every rule says of a wheel; of a file that is none, that alone."""
    try:
        words = f"{len(wheel.entries)} files, called {wheel.name}"
    except Broken as error:
        return [Result(READABLE, BROKEN, str(error))]
    return [Result(READABLE, OK, words), *(_result(rule, wheel, context) for rule in RULES)]


def _result(rule: Rule, wheel: AuditedWheel, context: Context) -> Result:
    try:
        return Result(rule.__name__, OK, rule(wheel, context))
    except Broken as error:
        return Result(rule.__name__, BROKEN, str(error))
    except Skipped as error:
        return Result(rule.__name__, SKIPPED, str(error))


def sizes(wheel: AuditedWheel) -> dict[str, int]:
    """Bytes of a wheel by what they are; none of a file that cannot be read."""
    if not wheel.is_readable:
        return {}
    kinds = {"download": wheel.path.stat().st_size, "installed": 0, "kernels": 0, "libraries": 0}
    for name, entry in wheel.entries.items():
        kinds["installed"] += len(entry.data)
        if "/kernels/" in name:
            kinds["kernels"] += len(entry.data)
        elif ".so" in name:
            kinds["libraries"] += len(entry.data)
    return kinds


def sizes_table(wheels: Iterable[AuditedWheel]) -> str:
    """A line for each wheel that can be read, in MB."""
    rows = [(found, wheel.path) for wheel in wheels if (found := sizes(wheel))]
    lines: list[str] = []
    for kinds, path in rows:
        if not lines:
            lines.append(" ".join(f"{kind:>9}" for kind in kinds) + "  (MB)")
        numbers = " ".join(f"{value / 1e6:9.2f}" for value in kinds.values())
        lines.append(f"{numbers}  {'/'.join(path.parts[-5:])}")
    return "\n".join(lines)


def add_parser(commands: Any) -> None:
    """The subcommand with its options."""
    a = commands.add_parser("audit", help="check wheels by every rule")
    a.add_argument("wheels", nargs="+", metavar="WHEEL")
    a.add_argument(
        "--python",
        action="append",
        default=[],
        help="a Python whose torch to compare symbols with; may be repeated",
    )
    a.add_argument(
        "--fetch", action="store_true", help="download the torches that are not here, to compare"
    )
    a.add_argument("--strict", action="store_true", help="fail where a rule cannot be told, too")
    a.add_argument("--json", action="store_true", help="print a JSON list")
    assemble.add_parts_option(a)


def context_for(wheels: Iterable[AuditedWheel], options: argparse.Namespace) -> Context:
    """What there is to compare the wheels with; fetched if that is asked for."""
    matrix = Matrix()
    torches = [fetch.installed_torch(python) for python in options.python]
    # Names that a torch exports are the same for every machine of a C++ ABI.
    platforms = {matrix.facts.headers_from}
    for wheel in wheels:
        with suppress(Broken):  # a rule tells
            platforms.add(wheel.platform(matrix))
            if options.fetch:
                for torch in wheel.claimed_torches(matrix):
                    fetch.torch_libraries(torch.release, wheel.platform(matrix))
    for platform in sorted(platforms, key=lambda x: x.name):
        torches += fetch.fetched_torches(platform)
    return Context(matrix, tuple(torches), options.parts)


def run(options: argparse.Namespace) -> int:
    wheels = [AuditedWheel(Path(name)) for name in options.wheels]
    absent = [wheel.path for wheel in wheels if not wheel.path.is_file()]
    if absent:
        raise FileNotFoundError(f"there is no file {absent[0]}")
    context = context_for(wheels, options)
    results = {}
    for wheel in wheels:
        results[wheel] = audit(wheel, context)
        if not options.json:
            print(wheel.path)
            for result in results[wheel]:
                print(f"  {result.state:7} {result.rule:18} {result.told}", flush=True)
    states = Counter(result.state for each in results.values() for result in each)
    if options.json:
        print(json.dumps([_plain(wheel, each) for wheel, each in results.items()], indent=1))
    else:
        print(sizes_table(wheels))
        counts = ", ".join(f"{states[state]} {state}" for state in (OK, SKIPPED, BROKEN))
        print(f"{len(wheels)} wheels: {counts}")
    return 1 if states[BROKEN] or (options.strict and states[SKIPPED]) else 0


def _plain(wheel: AuditedWheel, results: list[Result]) -> dict[str, Any]:
    rules = [vars(result) for result in results]
    return {"wheel": str(wheel.path), "rules": rules, "bytes": sizes(wheel)}
