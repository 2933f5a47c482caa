"""`python -m flash_attn`: what is installed, what would run, a self-test, and advice."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from flash_attn import _selftest, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if the self-test fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m flash_attn", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-self-test", action="store_true", help="only report, compute nothing")
    options = parser.parse_args(arguments)
    try:
        report = info.collect()
    except ValueError as error:  # an environment variable with a value that none of them takes
        parser.error(str(error))
    if not options.json:
        _show_report(report)
    outcomes = [] if options.no_self_test else _self_test(is_quiet=options.json)
    if options.json:
        checks = [{**vars(outcome), "passed": outcome.passed} for outcome in outcomes]
        print(json.dumps({**report, "self_test": checks}, indent=2))
    else:
        _show_outcomes(outcomes)
        _show_list("Advice", report["advice"] or ["Nothing to do."])
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _show_report(report: dict[str, Any]) -> None:
    versions = {name: version or "not installed" for name, version in report["versions"].items()}
    _show_table("Versions", ("what", "version"), versions.items())
    _show_table(
        "Devices", ("device", "what"), ((d["name"], d["description"]) for d in report["devices"])
    )
    _show_table(
        "Backends", ("backend", "what"), ((b["name"], b["note"]) for b in report["backends"])
    )
    _show_table(
        "What would run",
        ("device", "problem", "backend", "kernels"),
        (
            (p["device"], p["title"], p["backend"] or _why(p["reasons"]), ", ".join(p["kernels"]))
            for p in report["plans"]
        ),
    )


def _why(reasons: dict[str, list[str]]) -> str:
    """ "none: ..." with the first reason of each backend."""
    return "none: " + "; ".join(f"{name} {words[0]}" for name, words in reasons.items())


def _self_test(is_quiet: bool) -> list[_selftest.Outcome]:
    """Run the checks, with one line of progress on a terminal."""
    served = info.served_devices()
    total, outcomes = _selftest.num_checks(served), []
    shows_progress = sys.stderr.isatty() and not is_quiet
    for outcome in _selftest.run(served):
        outcomes.append(outcome)
        if shows_progress:
            end = "\n" if len(outcomes) == total else ""
            print(f"\rself-test {len(outcomes)}/{total}", end=end, file=sys.stderr, flush=True)
    return outcomes


def _show_outcomes(outcomes: list[_selftest.Outcome]) -> None:
    if not outcomes:
        return
    rows = (
        (
            outcome.device,
            outcome.name,
            "ok" if outcome.passed else "FAILED",
            f"{outcome.error:.1e} of {outcome.allowed:.1e}",
            f"{outcome.seconds * 1e3:.0f} ms",
        )
        for outcome in outcomes
    )
    columns = ("device", "check", "result", "error of allowed", "time")
    _show_table("Self-test against standard attention in float64", columns, rows)


def _show_list(title: str, lines: Iterable[str]) -> None:
    print(f"{title}")
    for line in lines:
        print(f"  - {line}")


def _show_table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    """A table, by rich where it is installed."""
    texts = [tuple(str(cell) for cell in row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _show_plain_table(title, columns, texts)
        return
    table = Table(*columns, title=title, title_justify="left", title_style="bold")
    for row in texts:
        table.add_row(*row)
    Console().print(table)


def _show_plain_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    print(title)
    for row in (columns, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print()


if __name__ == "__main__":
    sys.exit(main())
