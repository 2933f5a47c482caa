"""The table of where a wheel has run: rows of several runs in one result, and as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import environments
import pytest
import result_tables

ROOT = Path(__file__).resolve().parents[1]


def row(torch: str, python: str, **told: Any) -> dict[str, Any]:
    """What the wheel did beside one torch."""
    right = {"cxx11abi": "TRUE", "shim": "_shim_stable.so", "not_loaded": "", "error": 1e-6}
    return {"torch": torch, "python": python, **right, "gpus": [], "passed": 5, "checks": 5, **told}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "flash_attn-2.8.3-py3-none-manylinux_2_28_x86_64.whl"
    path.write_bytes(b"a wheel")
    return path


def result(wheel: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    """What runs leave that come one after the other."""
    told: dict[str, Any] = {}
    for each in rows:
        told = environments.merged(told, wheel, each)
    return {**told, "date": "2026-11-21"}


def test_runs_add_up_in_the_order_of_versions(wheel: Path) -> None:
    old, new = row("2.13.0+cpu", "3.9.18", passed=4), row("2.13.0+cpu", "3.9.18")
    others = [row("2.13.0+cu130", "3.9.18"), row("2.4.1", "3.13.0"), row("2.4.1", "3.9.18")]
    told = result(wheel, old, *others, new)
    assert told["rows"] == [others[2], others[1], new, others[0]]


def test_rows_of_another_wheel_are_dropped(wheel: Path) -> None:
    told = result(wheel, row("2.4.1", "3.9.18"))
    wheel.write_bytes(b"another")
    only = row("2.5.1", "3.9.18")
    assert environments.merged(told, wheel, only)["rows"] == [only]


def test_pythons_share_a_line_where_nothing_differs(wheel: Path) -> None:
    rows = [row("2.8.0", "3.9.18"), row("2.8.0", "3.12.1", error=3e-6)]
    failed = row("2.8.0", "3.13.0", passed=4, not_loaded="no shim")
    lines = result_tables.environments_section(result(wheel, *rows, failed)).splitlines()
    assert lines[-2:] == [
        "| 2.8.0 | 3.9.18, 3.12.1 | TRUE | `_shim_stable.so` | none | 3e-06 | 5 of 5 |",
        "| 2.8.0 | 3.13.0 | TRUE | no shim | none | 1e-06 | 4 of 5 |",
    ]
