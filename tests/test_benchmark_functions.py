"""`utils.benchmark`: what is called, how often, and what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn.utils import benchmark

CALLS: list[str] = []


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        CALLS.append("forward")
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        CALLS.append("backward")
        return 2 * grad


def doubled(x: Tensor, is_pair: bool = False) -> Any:
    y = Counted.apply(x)
    return (y, "more") if is_pair else y


@pytest.fixture
def x() -> Tensor:
    CALLS.clear()
    return torch.ones(4, requires_grad=True)


@pytest.mark.parametrize("is_pair", [True, False])
def test_passes_are_timed_by_themselves_and_together(
    x: Tensor, is_pair: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    grad = torch.arange(4.0)
    options = {"grad": grad, "repeats": 3, "is_pair": is_pair, "desc": "doubled"}
    measured = benchmark.benchmark_all(doubled, x, **options)
    assert len(measured) == 3
    for _, measurement in measured:
        assert measurement.mean > 0
    # timeit runs a call or two in front, to warm up.
    assert CALLS.count("forward") >= 3 + 1 + 3
    assert CALLS.count("backward") >= 3 + 3
    assert torch.equal(x.grad, 2 * grad)
    told = capsys.readouterr().out
    for what in ("Forward", "Backward", "Forward + Backward"):
        assert f"doubled - {what} pass" in told


def test_quiet_measurements_print_nothing(x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    timer, measurement = benchmark.benchmark_forward(doubled, x, repeats=2, verbose=False)
    assert measurement.number_per_run == 2
    assert timer.timeit(1).mean > 0
    benchmark.benchmark_fwd_bwd(doubled, x, repeats=1, verbose=False, amp=True)
    assert capsys.readouterr().out == ""


def test_a_gradient_of_another_shape_is_told(x: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"grad must have the shape of the output, \(4,\)"):
        benchmark.benchmark_backward(doubled, x, grad=torch.ones(3))


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_the_profiler_shows_and_writes_what_ran(
    x: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    benchmark.pytorch_profiler(doubled, x, backward=True, cpu=True, trace_filename=str(trace))
    assert "aten::mul" in capsys.readouterr().out
    assert json.loads(trace.read_text("utf-8"))["traceEvents"]
    assert CALLS.count("backward") == 31


@pytest.mark.gpu
def test_memory_is_the_most_there_was() -> None:
    count = 250_000_000
    found = benchmark.benchmark_memory(lambda: torch.empty(count, device="cuda", dtype=torch.int8))
    assert found >= count / 1e9
