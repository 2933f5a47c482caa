"""FLASH_ATTN_DEBUG: what stands in the tables of a call is checked on every backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
import flash_attn_interface as fa3
from flash_attn import backends, info


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cache(**tables: Any) -> Callable[[str], Any]:
    """A step over a cache of eight rows of 20 keys, or as many pages."""

    def call(device: str) -> Any:
        q = torch.ones(2, 1, 4, 64, dtype=torch.float16, device=device)
        caches = [torch.ones(8, 20, 2, 64, dtype=torch.float16, device=device) for _ in range(2)]
        given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in tables.items()}
        if given.pop("new", False):
            given["k"] = given["v"] = torch.ones(2, 1, 2, 64, dtype=torch.float16, device=device)
        if "cache_batch_idx" not in given and "page_table" not in given:
            caches = [x[:2] for x in caches]
        return fa3.flash_attn_with_kvcache(q, *caches, **given)

    return call


def packed(device: str, cu: Tensor, backward: bool = False) -> Any:
    q = torch.ones(9, 2, 64, dtype=torch.float16, device=device, requires_grad=backward)
    return flash_attn.flash_attn_varlen_func(q, q, q, cu.to(device), cu.to(device), 9, 9)


CACHED = "^flash_attn_with_kvcache: "
CASES: dict[str, tuple[Callable[[str], Any], str]] = {
    "length": (cache(cache_seqlens=ints(20, 21)), CACHED + r"cache_seqlens\[1\] is 21; .* 20"),
    "negative": (cache(cache_seqlens=ints(-3, 2)), CACHED + r"cache_seqlens\[0\] is -3; .* 0 and"),
    "append": (
        cache(cache_seqlens=ints(19, 20), new=True),
        CACHED + r"cache_seqlens\[1\] is 20; it must lie between 0 and 19, .* less those appended",
    ),
    "leftpad": (
        cache(cache_seqlens=ints(9, 9), cache_leftpad=ints(0, 10)),
        CACHED + r"cache_leftpad\[1\] is 10; it must lie between 0 and 9",
    ),
    "row": (
        cache(cache_seqlens=ints(1, 2), cache_batch_idx=ints(7, 8)),
        CACHED + r"cache_batch_idx\[1\] is 8; it must lie between 0 and 7, the last row of the cac",
    ),
    "page": (
        cache(cache_seqlens=ints(20, 25), page_table=ints((0, 99), (1, 8))),
        CACHED + r"page_table\[1, 1\] is 8; it must lie between 0 and 7, the last page",
    ),
    "offset": (
        lambda device: packed(device, ints(0, 7, 5)),
        r"^flash_attn_varlen_func: cu_seqlens_q\[2\] is 5; it must lie between 7 and 9",
    ),
    "offset_with_gradient": (
        lambda device: packed(device, ints(0, 4, 10), backward=True),
        r"^flash_attn_varlen_func: cu_seqlens_q\[2\] is 10; it must lie between 4 and 9",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cpu_always_tells(name: str) -> None:
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call("cpu")


@pytest.mark.parametrize("name", CASES)
def test_debug_mode_tells_before_another_backend_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def forward(call: Any, name: str) -> Any:
        called.append(name)
        return backends.cpu.forward(call, name)

    other = SimpleNamespace(forward=forward, backward=backends.cpu.backward)
    monkeypatch.setattr(backends, "_backend_for", lambda problem, name: other)
    monkeypatch.setenv("FLASH_ATTN_DEBUG", "1")
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call("cpu")
    assert not called
    cache(cache_seqlens=ints(19, 20))("cpu")
    cache(cache_seqlens=ints(19, 0), new=True)("cpu")
    monkeypatch.delenv("FLASH_ATTN_DEBUG")
    with pytest.raises(ValueError, match=message):
        call("cpu")  # of the backend itself
    assert len(called) == 3


def test_the_report_shows_that_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_DEBUG", "1")
    assert "FLASH_ATTN_DEBUG=1 is set; the README says what it does." in info.advice()


GPU_PROGRAM = """
import re, sys, torch
sys.path.insert(0, {tests!r})
import test_debug
from flash_attn.backends import cuda
for name, (call, message) in test_debug.CASES.items():
    try:
        call("cuda")
        print(name, "passed")
    except ValueError as error:
        assert re.match(message, str(error)), (name, error)
test_debug.cache(cache_seqlens=test_debug.ints(19, 20))("cuda")
lens = torch.tensor([19, 20], dtype=torch.int32, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):  # nothing can be looked at here
    test_debug.cache(cache_seqlens=lens)("cuda")
print("direct" if cuda.IS_DIRECT else "through Python")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("debug", ["0", "1"])
def test_on_a_gpu(debug: str) -> None:
    program = GPU_PROGRAM.format(tests=str(Path(__file__).parent))
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FLASH_ATTN_DEBUG": debug},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    told = child.stdout.split("\n")[:-1]
    if debug == "1":
        assert told == ["through Python"]
    else:
        assert told[:-1] == [f"{name} passed" for name in CASES]  # clamped
