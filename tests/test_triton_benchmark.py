"""The benchmark of the Triton kernels, on the CPU: small sizes, and timers that make times up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import pytest
import report
import result_tables
import torch
import triton_backend as bench

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[bench.Operation]:
    """Small ones; nothing is compiled."""
    monkeypatch.setattr(bench, "ROTARY_SHAPE", (2, 16, 3, 32))
    monkeypatch.setattr(bench, "LOGITS_SHAPE", (5, 40))
    monkeypatch.setattr(bench, "NORM_SHAPE", (6, 64))
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    return list(bench.operations("cpu"))


def timer(call: Callable[[], Any], count: int) -> list[float]:
    call()
    return [2.0] * count


def test_the_cases_are_those_that_are_promised() -> None:
    cases = list(bench.cases())
    assert {case.head_dim for case in cases} == {64, 128}
    assert {case.batch * case.seqlen for case in cases} == {gpu.TOKENS}
    assert (min(c.seqlen for c in cases), max(c.seqlen for c in cases)) == (1024, 16384)
    assert len(cases) == len(set(cases)) == 20


def test_every_method_computes_the_same_and_has_a_rate(operations: list[bench.Operation]) -> None:
    rows = [row for operation in operations for row in bench.measure(operation, timer)]
    assert len({row["operation"] for row in rows}) == len(rows) / 2 == 5
    for row in rows:
        assert row["difference"] < gpu.MAX_DIFFERENCE
        assert list(row["gb_s"]) == list(bench.METHODS)
    # Rotary reads x and writes as much, 2 bytes an element, in 2 ms.
    assert rows[0]["gb_s"][bench.OURS] == pytest.approx(2 * 2 * (2 * 16 * 3 * 32) / 2e-3 * 1e-9)


def test_results_that_differ_are_not_measured(operations: list[bench.Operation]) -> None:
    ours = operations[0].functions[bench.OURS]
    operations[0].functions[bench.OURS] = lambda: 1.1 * ours()
    with pytest.raises(RuntimeError, match=r"^rotary: the results differ by 1\.0e-01 of"):
        bench.measure(operations[0], timer)


def test_a_result_becomes_tables(operations: list[bench.Operation], tmp_path: Path) -> None:
    made_up = {
        "ms": {gpu.OURS: 1.0, gpu.THEIRS: 1.2},
        "tflops": {gpu.OURS: 300.0, gpu.THEIRS: 250.0},
        "ratio": {"median": 1.234, "min": 1.2, "max": 1.3},
    }
    result = {
        "kind": "triton",
        "date": "2026-11-21",
        "device": "NVIDIA Example 80GB",
        "driver": "580.1",
        "power_limit": "700 W",
        "copy_gb_s": 2800.0,
        "versions": {"Triton": "3.6.0"},
        "cpu": gpu_cpu_rows(),
        "operations": [row for op in operations for row in bench.measure(op, timer)],
        "rows": [
            {**vars(case), "passes": passes, **made_up}
            for case in bench.cases()
            for passes in bench.PASSES
        ],
    }
    path = report.write(result, tmp_path / "result.json")
    assert len(path.read_text("utf-8").splitlines()) > len(result["rows"])
    text = result_tables.triton_section({**result, "file": path.name})
    assert "Triton 3.6.0. Driver 580.1, 700 W. A copy: 2800 GB/s." in text
    assert "| 128 | causal | 1.23 ±0.05 (300) |" in text
    assert "| GB/s of | Pass | flash_attn | torch.compile | torch |" in text
    assert text.count("| cross entropy |") == 2


def gpu_cpu_rows() -> list[dict[str, Any]]:
    us = {m: {"median": 90.0, "min": 80.0, "max": 99.0} for m in gpu.METHODS}
    return [{"gradients": needs, "us": us} for needs in (False, True)]
