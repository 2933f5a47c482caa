"""The benchmark of a GPU, run on the CPU: small sizes, and timers that make times up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import pytest
import report
import result_tables
import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL = gpu.Case("bfloat16", batch=2, seqlen=64, heads=2, head_dim=32, causal=True)


def made_up(times: dict[str, float]) -> tuple[gpu.Timer, list[str]]:
    """A timer of calls that return their method's name, and the order in which it was asked."""
    order: list[str] = []

    def timer(call: Callable[[], Any], count: int) -> list[float]:
        order.append(call())
        return [times[call()]] * count

    return timer, order


def test_the_cases_have_the_same_tokens_and_width() -> None:
    cases = list(gpu.cases(["bfloat16"]))
    assert len(cases) == len(set(cases)) == 36
    assert {case.batch * case.seqlen for case in cases} == {16384}
    assert {case.heads * case.head_dim for case in cases} == {2048}


def test_flops_are_those_of_the_products() -> None:
    full = gpu.Case("bfloat16", 1, 1024, 2, 64, causal=False)
    # S = Q K^T and O = P V, 2 FLOPs a multiplication and addition, over 2 heads.
    assert full.flops("fwd") == 2 * 2 * (2 * 1024 * 1024 * 64)
    assert full.flops("bwd") == 2.5 * full.flops("fwd")
    causal = gpu.Case("bfloat16", 1, 1024, 2, 64, causal=True)
    assert causal.flops("fwd+bwd") == (full.flops("fwd") + full.flops("bwd")) / 2


def test_methods_take_turns_and_either_is_first() -> None:
    timer, order = made_up({"a": 1.0, "b": 2.0})
    rounds = gpu.take_turns({name: lambda name=name: name for name in "ab"}, timer)
    assert rounds == {"a": [1.0] * gpu.ROUNDS, "b": [2.0] * gpu.ROUNDS}
    turns = order[-2 * gpu.ROUNDS :]
    assert "".join(turns) == "abba" * (gpu.ROUNDS // 2) + "ab" * (gpu.ROUNDS % 2)


def test_each_method_runs_for_its_share_of_the_time() -> None:
    counts: list[int] = []

    def timer(call: Callable[[], Any], count: int) -> list[float]:
        counts.append(count)
        return [2.0] * count

    gpu.take_turns({"a": lambda: None}, timer)
    each_round = int(gpu.TOTAL_MS / gpu.ROUNDS / 2.0)
    assert counts == [gpu.MIN_CALLS, int(gpu.WARM_UP_MS / 2.0) + 1, *[each_round] * gpu.ROUNDS]


def test_a_ratio_comes_from_the_rounds_not_from_the_medians() -> None:
    rounds = {gpu.OURS: [1.0, 2.0, 1.0], gpu.THEIRS: [1.2, 2.0, 0.9]}
    assert gpu.ratio_of(rounds) == {"median": 1.0, "min": 0.9, "max": 1.2}


def test_both_methods_compute_the_same_here() -> None:
    assert gpu.Calls(SMALL, "cpu").difference() < gpu.MAX_DIFFERENCE


def test_a_measurement_has_a_row_for_each_pass() -> None:
    def timer(call: Callable[[], Any], count: int) -> list[float]:
        call()
        return [4.0] * count

    rows = gpu.measure(SMALL, timer, "cpu")
    assert [row["passes"] for row in rows] == list(gpu.PASSES)
    for row in rows:
        assert row["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert row["tflops"][gpu.OURS] == pytest.approx(SMALL.flops(row["passes"]) / 4e-3 / 1e12)
        assert (row["head_dim"], row["causal"]) == (32, True)


def test_results_that_differ_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.Calls, "difference", lambda self: float("nan"))
    with pytest.raises(RuntimeError, match=r"^Case\(dtype='bfloat16', .* differ by nan of their"):
        gpu.measure(SMALL, lambda call, count: [1.0], "cpu")


def test_the_cpu_time_of_a_call_is_taken_with_and_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "CPU_SHAPE", (1, 8, 1, 8))
    monkeypatch.setattr(gpu, "CPU_ROUNDS", 3)
    monkeypatch.setattr(gpu, "CPU_CALLS", 2)
    rows = gpu.cpu_times("cpu")
    assert [row["gradients"] for row in rows] == [False, True]
    for row in rows:
        assert all(0 < row["us"][m]["min"] <= row["us"][m]["median"] for m in gpu.METHODS)
    assert torch.is_grad_enabled()


def example() -> dict[str, Any]:
    """What `run` writes, with times made up."""
    rows = [
        {
            **vars(case),
            "passes": passes,
            "ms": {gpu.OURS: 1.0, gpu.THEIRS: 1.23456},
            "tflops": {gpu.OURS: 300.0, gpu.THEIRS: 250.0},
            "ratio": {"median": 1.23456, "min": 1.2, "max": 1.3},
            "difference": 0.001,
        }
        for case in gpu.cases(["bfloat16"])
        for passes in gpu.PASSES
    ]
    us = {m: {"median": 12.0, "min": 11.0, "max": 20.0} for m in gpu.METHODS}
    ratio = {"median": 1.0, "min": 1.0, "max": 1.0}
    return {
        "kind": "gpu",
        "date": "2026-11-21",
        "device": "NVIDIA Example 80GB",
        "driver": "580.1",
        "power_limit": "700 W",
        "max_clock": "1980 MHz",
        "kernels": ["90 cubin"],
        "versions": {"flash-attn": "2.8.3", "torch": "2.11.0"},
        "cpu": [{"gradients": g, "us": us, "ratio": ratio} for g in (False, True)],
        "rows": rows,
    }


def test_a_run_measures_every_case_and_says_how_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, made = gpu.measure, example()
    monkeypatch.setattr(gpu, "cases", lambda dtypes: iter([SMALL, SMALL]))
    monkeypatch.setattr(gpu, "CudaTimer", lambda: lambda call, count: [1.0])
    monkeypatch.setattr(gpu, "measure", lambda *given, **how: measure(*given, "cpu", **how))
    monkeypatch.setattr(gpu, "cpu_times", lambda: made.pop("cpu"))
    told = {key: x for key, x in made.items() if key != "rows"}
    monkeypatch.setattr(report, "of_gpu", lambda kind: told)
    path = gpu.run(["bfloat16"], tmp_path / "new" / "result.json")
    assert len(json.loads(path.read_text("utf-8"))["rows"]) == 6
    line = "bfloat16 32 causal 64: fwd 1.00, bwd 1.00, fwd+bwd 1.00"
    assert capsys.readouterr().err.splitlines() == [line, line]


def test_a_result_is_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = report.write(example(), None)
    assert path.name == "2026-11-21-nvidia-example-80gb.json"
    result = json.loads(path.read_text("utf-8"))
    assert result["rows"][0]["ms"][gpu.THEIRS] == 1.235
    assert len(result["rows"]) == 36 * 3
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "plot", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert told == str(path.with_suffix(".png"))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_result_is_rendered_with_ratios_spread_and_speed() -> None:
    text = result_tables.gpu_section({**example(), "file": "no-such-file.json"})
    lines = text.splitlines()
    assert lines[0] == "### NVIDIA Example 80GB, 2026-11-21"
    assert "| with gradients to come | 12.0 (from 11.0) | 12.0 (from 11.0) |" in lines
    cell = "1.23 ±0.05 (300)"
    assert lines.count(f"| 128 | causal |{f' {cell} |' * 6}") == 3
    assert "png" not in text
