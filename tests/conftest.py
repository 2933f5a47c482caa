"""Devices for the whole suite: CPU rows always run; `gpu` rows need a backend that serves a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton kernels run in Triton's interpreter. Triton reads this when it is imported,
# which torch's tools do on their own.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from cache_problem import CacheProblem

from flash_attn import _support, backends
from flash_attn._problem import Problem

settings.register_profile("flash_attn", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("flash_attn")

# Processes that test side by side share the processors: the oracle's products take all of them.
torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)


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


# GPU backends compute in 16 bits: there, rows in wider dtypes run in these.
_ON_GPU = {torch.float32: torch.float16, torch.float64: torch.bfloat16}


def _is_served(problem: Any) -> bool:
    """Whether the GPU backends of this release have what a row asks for."""
    features = frozenset().union(
        *(row.features for row in _support.BACKENDS if "cuda" in row.device_types)
    )
    wanted = {"qv": problem.qv, "fp8": problem.dtype == torch.float8_e4m3fn}
    # FP8 goes without new keys and pages there.
    if isinstance(problem, CacheProblem) and problem.dtype == torch.float8_e4m3fn:
        return False
    asked = frozenset(name for name, is_on in wanted.items() if is_on)
    capability = torch.cuda.get_device_capability()
    latent = Problem("cuda", "bfloat16", problem.d, problem.value_dim, asked, capability)
    if latent.is_latent:  # of some devices alone
        return any(not reasons for _, reasons in backends.explain(latent))
    return asked <= features


def _runs_here(item: pytest.Item) -> bool:
    """Whether this machine runs the item; a row for a GPU is fitted to it."""
    if item.get_closest_marker("gpu") is None:
        return True
    if _reason_against_every_gpu_test():
        return False
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec else {}
    problem = params.get("problem")
    if problem is None:
        return True
    params["problem"] = replace(problem, dtype=_ON_GPU.get(problem.dtype, problem.dtype))
    return _is_served(problem)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    runs = [_runs_here(item) for item in items]
    config.hook.pytest_deselected(items=[x for x, run in zip(items, runs) if not run])
    items[:] = [x for x, run in zip(items, runs) if run]


def pytest_report_header() -> str:
    reason = _reason_against_every_gpu_test()
    if reason:
        return f"gpu tests: deselected ({reason})"
    return f"gpu tests: in {', '.join(_support.dtypes_of_device('cuda'))}"


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
