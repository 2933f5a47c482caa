"""Devices for the whole suite: CPU rows always run; `gpu` rows need a backend that serves a GPU."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import settings

from flash_attn import _support, backends
from flash_attn._problem import Problem

settings.register_profile("flash_attn", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("flash_attn")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device type that a test runs on."""
    return request.param


@cache
def _reason_against_every_gpu_test() -> str:
    """Why no gpu test can run here; empty when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    plain = Problem("cuda", "bfloat16", 64, 64, capability=torch.cuda.get_device_capability())
    rows = backends.explain(plain)
    if all(reasons for _, reasons in rows):
        return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in rows)
    return ""


def _runs_here(item: pytest.Item) -> bool:
    """Whether this machine runs the item; a gpu row runs in the dtypes of the GPU backends only."""
    if item.get_closest_marker("gpu") is None:
        return True
    if _reason_against_every_gpu_test():
        return False
    callspec = getattr(item, "callspec", None)
    problem = callspec.params.get("problem") if callspec else None
    served = _support.dtypes_of_device("cuda")
    return problem is None or str(problem.dtype).removeprefix("torch.") in served


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselected = [item for item in items if not _runs_here(item)]
    items[:] = [item for item in items if _runs_here(item)]
    config.hook.pytest_deselected(items=deselected)


def pytest_report_header() -> str:
    reason = _reason_against_every_gpu_test()
    if reason:
        return f"gpu tests: deselected ({reason})"
    return f"gpu tests: rows in {', '.join(_support.dtypes_of_device('cuda'))}"
