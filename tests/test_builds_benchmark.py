"""The benchmark of builds against one another, as far as it runs without a GPU."""

from __future__ import annotations

import io
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


def test_a_worker_times_the_cases_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def cases(passes: Any) -> Any:
        for name, ms in (("a fwd", 1.0), ("b fwd", 2.0), ("ab fwd", 3.0)):
            yield name, lambda ms=ms: made.append(ms) or (lambda: ms)

    monkeypatch.setattr(builds, "cases", cases)
    replies = io.StringIO()
    names = ["ab fwd\n", "ab fwd\n", "a fwd\n"]
    builds.work(names, replies, lambda call, count: [call()] * count)
    assert replies.getvalue() == "3.0\n3.0\n1.0\n"
    assert made == [3.0, 1.0], "a case is made once for all of its rounds"


def test_a_round_is_warmed_up_and_fills_its_time() -> None:
    counts: list[int] = []

    def timer(call: Any, count: int) -> list[float]:
        counts.append(count)
        return [1.0] * count

    assert builds.round_of(lambda: None, timer) == 1.0
    assert counts == [gpu.MIN_CALLS, 5, 15]


WORKER = """
import os, sys
print("torch says something", file=sys.stderr)
for line in sys.stdin:
    if line.strip() not in ("a fwd", "b fwd"):
        sys.exit(1)
    print(os.path.getsize(os.path.join(os.environ["PYTHONPATH"], "us")) / 1e3, flush=True)
"""


@pytest.fixture
def two_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Folders of builds whose time is the size of a file, by a worker without a GPU."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(builds, "__file__", str(tmp_path / "worker.py"))
    for name, us in (("base", 10), ("new", 8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "us").write_bytes(b"x" * us)
    return [str(tmp_path / x) for x in ("base", "new")]


def test_builds_take_turns(
    two_builds: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [(x, lambda: lambda: None) for x in ("a fwd", "b fwd", "c fwd")]
    monkeypatch.setattr(builds, "cases", lambda passes: named)
    monkeypatch.setattr(sys, "argv", ["builds.py", *two_builds, "--only", "[ab] fwd"])
    assert builds.main() == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == f"| Case | {two_builds[0]}, us | {two_builds[1]} |"
    assert rows[2:] == [f"| {x} fwd | 10.0 | 8.0 (+25.0 % ±0.0) |" for x in "ab"]


def test_a_build_that_fails_is_named(two_builds: list[str]) -> None:
    failure = pytest.raises(RuntimeError, match="new: the build has failed in c fwd")
    with builds.Build(Path(two_builds[1])) as build, failure:
        build.time("c fwd")


def test_another_build_is_first_in_each_round() -> None:
    order: list[int] = []

    def stub(i: int) -> Any:
        return SimpleNamespace(time=lambda name: order.append(i) or float(len(order)))

    times = builds.take_turns([stub(0), stub(1), stub(2)], "a fwd", 2)
    assert order == [0, 1, 2, 1, 2, 0]
    assert times == [[1.0, 6.0], [2.0, 4.0], [3.0, 5.0]]


def test_one_build_is_none_to_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["builds.py", "one"])
    with pytest.raises(SystemExit):
        builds.main()
    assert "name two builds or more" in capsys.readouterr().err
