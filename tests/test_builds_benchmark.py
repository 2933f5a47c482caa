"""The benchmark of builds against one another, as far as it runs without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builds
import gpu
import pytest


def test_each_case_has_a_name_of_its_own() -> None:
    names = [name for name, _ in builds.cases(builds.PASSES)]
    assert len(names) == len(set(names))
    assert {"dense, 128 causal 4096 bwd", "FP8, 128 full 1024 fwd"} <= set(names)
    assert all(name.endswith("bwd") for name, _ in builds.cases(["bwd"]))


def test_a_worker_times_the_cases_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def cases(passes: Any) -> Any:
        for name, ms in (("a fwd", 1.0), ("b fwd", 2.0), ("ab fwd", 3.0)):
            yield name, lambda ms=ms: made.append(ms) or (lambda: ms)

    monkeypatch.setattr(builds, "cases", cases)
    found = builds.measure("^a", ["fwd"], lambda call, count: [call()] * count)
    assert found == {"a fwd": 1.0, "ab fwd": 3.0}
    assert made == [1.0, 3.0]


def test_builds_take_turns_and_the_fastest_round_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ms = iter((0.010, 0.008, 0.012, 0.0125))
    asked = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        asked.append((env["PYTHONPATH"], command[2:]))
        return SimpleNamespace(stdout="torch says something\n" + json.dumps({"case": next(ms)}))

    monkeypatch.setattr(builds, "subprocess", SimpleNamespace(run=run, PIPE=-1))
    folders = [str(tmp_path / x) for x in ("base", "new")]
    monkeypatch.setattr(sys, "argv", ["builds.py", *folders, "--rounds", "2", "--passes", "fwd"])
    assert builds.main() == 0
    assert asked == [(x, ["--worker", "--only", "", "--passes", "fwd"]) for x in folders] * 2
    rows = capsys.readouterr().out.splitlines()
    assert rows[-1] == "| case | 10.0 | 8.0 (+25.0%) |"


def test_one_build_is_none_to_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["builds.py", "one"])
    with pytest.raises(SystemExit):
        builds.main()
    assert "name two builds or more" in capsys.readouterr().err


def test_a_build_is_warmed_up_and_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def timer(call: Any, count: int) -> list[float]:
        counts.append(count)
        return [1.0] * count

    monkeypatch.setattr(builds, "cases", lambda passes: [("a", lambda: lambda: None)])
    builds.measure("", ["fwd"], timer)
    assert counts == [gpu.MIN_CALLS, 5, 15]
