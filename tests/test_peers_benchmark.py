"""The benchmark against peers, as far as it runs without a GPU."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import peers
import plot
import pytest
import result_tables
import torch
from accuracy import with_outliers
from peer_methods import (
    FA3,
    KINDS,
    OURS,
    Case,
    FlashAttention3,
    FlashAttention4,
    FlashAttn,
    Inputs,
    add_cute,
    deterministic,
)

import flash_attn
import flash_attn_interface

DENSE = Case("dense", 2, 1024, 4, 4, 64, causal=False)


def pairs(case: Case) -> float:
    """Pairs of a query and a key that it sees, one by one; half of them where causal."""
    total = 0.0
    for seqlen in case.lengths or (case.seqlen,) * case.batch:
        for row in range(seqlen):
            total += min(row, case.window) + 1 if case.window >= 0 else seqlen
    return total * (0.5 if case.causal else 1.0)


@pytest.mark.parametrize(
    "case",
    [
        DENSE,
        Case("dense", 2, 1024, 4, 4, 64, causal=True),
        Case("window", 1, 700, 4, 4, 64, causal=False, window=127),
        Case("packed", 3, 90, 4, 4, 64, causal=True, lengths=(1, 90, 33)),
    ],
)
def test_flops_are_those_of_pairs_that_are_seen(case: Case) -> None:
    # S = Q K^T and O = P V, 2 FLOPs a multiplication and addition.
    assert case.flops("fwd") == pytest.approx(2 * 2 * case.heads * pairs(case) * case.head_dim)
    assert case.flops("bwd") == pytest.approx(2.5 * case.flops("fwd"))


def test_cases_are_dense_ones_of_one_size_and_others() -> None:
    cases = list(peers.cases())
    dense = [case for case in cases if case.kind == "dense" and case.head_dim in (64, 128, 256)]
    assert {case.batch * case.seqlen for case in dense} == {gpu.TOKENS}
    assert len(dense) == 3 * 2 * len(peers.SEQLENS)
    assert {"window of 1024", "packed", "fp16"} <= {case.kind for case in cases}
    both = [case for case in cases if "fwd+bwd" in peers.passes_of(case)]
    assert len(both) == 3 * 2 * len(peers.SEQLENS_OF_BOTH)
    assert all("bwd" in peers.passes_of(case) for case in cases)


def test_every_method_has_a_time() -> None:
    def timer(call: Callable[[], Any], count: int) -> list[float]:
        return [call()] * count

    calls = {"slow": lambda: 2.0, "fast": lambda: 1.0}
    assert peers.take_turns(calls, timer, 75.0) == {"slow": 2.0, "fast": 1.0}


def test_the_difference_is_the_largest_of_all_methods() -> None:
    class Method:
        def __init__(self, *values: float) -> None:
            self.values = values

        def results(self) -> list[torch.Tensor]:
            return [torch.tensor([x]) for x in self.values]

    methods = {OURS: Method(1.0, 3.0), "a": Method(1.0, 3.0), "b": Method(1.0, 4.0)}
    assert peers.difference(methods) == pytest.approx(0.25)


def test_flash_attention_4_is_that_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(flash_attn, "__path__", [*flash_attn.__path__])
    cute = tmp_path / "flash_attn" / "cute.py"
    cute.parent.mkdir()
    cute.write_text(
        "def flash_attn_func(q, k, v, **rule):\n"
        "    return ('dense', rule), 'lse'\n"
        "def flash_attn_varlen_func(q, k, v, **rule):\n"
        "    return ('packed', rule), 'lse'\n"
    )
    ours = flash_attn.flash_attn_func
    dense = Case("window", 1, 64, 4, 4, 64, causal=False, window=31)
    packed = Case("packed", 2, 90, 4, 4, 64, causal=True, lengths=(90, 33))
    rules: dict[str, dict[str, Any]] = {
        "dense": {"causal": False, "window_size": (31, 0)},
        "packed": {"causal": True, "window_size": (-1, -1)},
    }
    for side in "qk":
        rules["packed"].update({f"cu_seqlens_{side}": "starts", f"max_seqlen_{side}": 90})
    try:
        add_cute(tmp_path)
        for kind, case in (("dense", dense), ("packed", packed)):
            inputs: Any = SimpleNamespace(case=case, qkv="qkv", cu_seqlens="starts")
            assert FlashAttention4(inputs).out == (kind, rules[kind])
    finally:
        sys.modules.pop("flash_attn.cute", None)
        vars(flash_attn).pop("cute", None)
    assert flash_attn.flash_attn_func is ours


# --- Hard inputs, and errors --------------------------------------------------------------------

SMALL = Case("dense", 2, 384, 2, 2, 32, causal=False)


def scores(inputs: Inputs) -> torch.Tensor:
    """In natural logarithms: (batch, heads, queries, keys)."""
    q, k = (x.detach().double().transpose(1, 2) for x in inputs.qkv[:2])
    return q @ k.transpose(-1, -2) * inputs.case.head_dim**-0.5


def test_scores_rise_by_more_than_a_sum_can_bear_in_every_block() -> None:
    for kind, blocks in (("rising", (0, 1, 2)), ("falling", (2, 1, 0))):
        found = scores(Inputs(SMALL, kind, "cpu")).unflatten(-1, (3, 128)).amax(-1)
        for before, after in zip(blocks, blocks[1:]):
            rise = (found[..., after] - found[..., before]) / math.log(2)
            # From 8 on the shift rises at every block; from 128 on, sums overflow.
            assert rise.min() > 8
            assert rise.max() < 128


def test_huge_scores_overflow_and_outliers_are_few() -> None:
    assert scores(Inputs(SMALL, "huge", "cpu")).amax() / math.log(2) > 128
    x = torch.ones(100_000)
    changed = with_outliers(x, torch.Generator().manual_seed(0))
    assert set(changed.tolist()) == {1.0, 10.0}
    assert 50 < (changed == 10).sum() < 200
    assert all(x.dtype == torch.bfloat16 for x in Inputs(SMALL, "outliers", "cpu").qkv)


def test_forward_and_backward_together_give_the_gradients_of_the_backward() -> None:
    method = FlashAttn(Inputs(SMALL, device="cpu"))
    names = ("forward", "backward", "both")
    assert [method.of(passes).__name__ for passes in gpu.PASSES] == list(names)
    assert all(map(torch.equal, method.of("fwd+bwd")(), method.of("bwd")()))


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        Case("grouped", 2, 70, 4, 2, 32, causal=True),
        Case("window", 1, 90, 2, 2, 32, causal=False, window=31),
        Case("packed", 3, 90, 2, 2, 32, causal=True, lengths=(1, 90, 33)),
    ],
    ids=lambda case: case.kind,
)
def test_flash_attention_3_is_asked_for_the_same(case: Case) -> None:
    # The operators of that name that this package has.
    assert flash_attn_interface.flash_attn_3_gpu
    inputs = Inputs(case, device="cpu")
    theirs = FlashAttention3(inputs)
    assert peers.difference({OURS: FlashAttn(inputs), FA3: theirs}) < 5e-3
    assert all(map(torch.equal, theirs.both(), theirs.backward()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_those_of_rounding(kind: str, causal: bool) -> None:
    case = dataclasses.replace(SMALL, causal=causal)
    row = peers.errors(Inputs(case, kind, "cpu"), {OURS: FlashAttn})
    assert row["inputs"] == kind
    assert list(row["error"][OURS]) == list(peers.TENSORS)
    assert all(1e-4 < error < 0.03 for error in row["error"][OURS].values())


def test_errors_and_hard_inputs_become_tables() -> None:
    error = {"out": 2e-3, "dq": 3e-3}
    row = {"inputs": "normal", "head_dim": 64, "causal": True}
    rows = [{**row, "error": {OURS: error, "FA3": {"out": 2e-3, "dq": 2e-3}}}]
    text = result_tables.errors_table(rows)
    assert "| normal | 64 | causal | 2.00e-03 (1.000) | 3.00e-03 (1.500) |" in text
    slower = [{**row, "inputs": name, "slower": {OURS: 1.02}} for name in ("normal", "huge")]
    assert result_tables.hard_table(slower).splitlines()[4:] == ["| huge | 64 | 1.020 |"]
    ordered = [{**row, "seqlen": 2048, "slower": {OURS: 1.05}}]
    lines = result_tables.order_table(ordered).splitlines()[4:]
    assert lines == ["| 64 | causal | 2048 | 1.050 |"]


def test_a_run_measures_speed_errors_and_hard_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The operators of FlashAttention-3's name that this package has.
    assert flash_attn_interface.flash_attn_3_gpu
    monkeypatch.setattr(peers, "cases", lambda: iter([SMALL]))
    monkeypatch.setattr(peers, "dense", lambda *sizes, **tokens: SMALL)
    monkeypatch.setattr(peers, "Inputs", partial(Inputs, device="cpu"))
    monkeypatch.setattr(gpu, "HEAD_DIMS", (32,))
    monkeypatch.setattr(gpu, "CudaTimer", lambda: lambda call, count: [2.0])
    monkeypatch.setattr(gpu, "CPU_SHAPE", (1, 8, 1, 8))
    monkeypatch.setattr(peers, "cpu_times", partial(peers.cpu_times, device="cpu"))
    tables = peers.tables({OURS: FlashAttn, FA3: FlashAttn})
    assert all(us["min"] > 0 for us in tables["cpu"][0]["us"].values())
    assert [(row["passes"], row["ratio"]) for row in tables["rows"]] == [("fwd", 1.0), ("bwd", 1.0)]
    assert len(tables["accuracy"]) == 2 * 2
    assert [row["inputs"] for row in tables["hard"]] == list(KINDS)
    for row in tables["hard"]:
        assert row["slower"] == {OURS: 1.0, FA3: 1.0}
        assert row["difference"] == 0.0
    assert [row["slower"] for row in tables["deterministic"]] == 18 * [{OURS: 1.0, FA3: 1.0}]


def test_deterministic_calls_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    plain = flash_attn.flash_attn_func

    def spy(*args: Any, **rule: Any) -> Any:
        told.append(rule.get("deterministic", False))
        return plain(*args, **rule)

    monkeypatch.setattr(flash_attn, "flash_attn_func", spy)
    for method in (FlashAttn, deterministic(FlashAttn)):
        method(Inputs(SMALL, device="cpu"))
    assert told == [False, True]


def test_a_pass_of_fewer_lengths_is_drawn(tmp_path: Path) -> None:
    rows = [
        {**vars(case), "passes": passes, "ratio": 1.0 + 0.1 * index}
        for case in peers.cases()
        for index, passes in enumerate(peers.passes_of(case))
    ]
    result = {"device": "NVIDIA Example", "date": "2026-11-21", "versions": {"torch": "2.11.0"}}
    plot.plot_peers({**result, "rows": rows}, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
