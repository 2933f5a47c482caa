"""How many compilers run at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_tools import ROOT  # puts the project on the path

from build_tools import jobs
from build_tools.paths import env

assert ROOT


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.BUILD_VARIABLES:
        for name in (variable.name, *variable.aliases):
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], limit: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n", "utf-8")
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert jobs.cores(tmp_path) == (limit or 64)


def test_memory_is_what_the_machine_and_the_container_leave(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 4096000 kB\n", "utf-8")
    assert jobs.memory_mb(tmp_path, meminfo) == 4000
    (tmp_path / "memory.max").write_text(str(3000 << 20), "utf-8")
    (tmp_path / "memory.current").write_text(str(1000 << 20), "utf-8")
    assert jobs.memory_mb(tmp_path, meminfo) == 2000
    # Page cache is given up where memory is needed.
    (tmp_path / "memory.stat").write_text(f"file 9\ninactive_file {500 << 20}\n", "utf-8")
    assert jobs.memory_mb(tmp_path, meminfo) == 2500
    (tmp_path / "memory.max").write_text("max", "utf-8")
    assert jobs.memory_mb(tmp_path, tmp_path / "absent") is None


def test_jobs_fit_cores_and_measured_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "cores", lambda: 16)
    monkeypatch.setattr(jobs, "memory_mb", lambda: 8000)
    assert jobs.choose(None, []) == 16
    assert jobs.choose(None, [100, 2000]) == 4
    assert jobs.choose(None, [90000]) == 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert jobs.choose(None, []) == 3
    assert jobs.choose(7, []) == 7


def test_a_wrong_number_of_jobs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (0, -3):
        with pytest.raises(ValueError, match=f"--jobs is {number}; it must be a positive number"):
            jobs.choose(number, [])
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(ValueError, match="MAX_JOBS is set to 'many'; it must be a positive number"):
        jobs.choose(None, [])
