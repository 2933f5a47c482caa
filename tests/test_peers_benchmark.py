"""The benchmark against peers, as far as it runs without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import peers
import pytest

import flash_attn

DENSE = peers.Case("dense", 2, 1024, 4, 4, 64, causal=False)


def pairs(case: peers.Case) -> float:
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
        peers.Case("dense", 2, 1024, 4, 4, 64, causal=True),
        peers.Case("window", 1, 700, 4, 4, 64, causal=False, window=127),
        peers.Case("packed", 3, 90, 4, 4, 64, causal=True, lengths=(1, 90, 33)),
    ],
)
def test_flops_are_those_of_pairs_that_are_seen(case: peers.Case) -> None:
    # S = Q K^T and O = P V, 2 FLOPs a multiplication and addition.
    assert case.flops("fwd") == pytest.approx(2 * 2 * case.heads * pairs(case) * case.head_dim)
    assert case.flops("bwd") == pytest.approx(2.5 * case.flops("fwd"))


def test_cases_are_dense_ones_of_one_size_and_others() -> None:
    cases = list(peers.cases())
    dense = [case for case in cases if case.kind == "dense" and case.head_dim in (64, 128, 256)]
    assert {case.batch * case.seqlen for case in dense} == {gpu.TOKENS}
    assert len(dense) == 3 * 2 * len(peers.SEQLENS)
    assert {"window of 1024", "packed", "fp16"} <= {case.kind for case in cases}


def test_every_method_has_a_time_in_every_round() -> None:
    def timer(call: Callable[[], Any], count: int) -> list[float]:
        return [call()] * count

    calls = {"slow": lambda: 2.0, "fast": lambda: 1.0}
    rounds = peers.take_turns(calls, timer)
    assert rounds == {"slow": [2.0] * peers.ROUNDS, "fast": [1.0] * peers.ROUNDS}


def test_the_difference_is_the_largest_of_all_methods() -> None:
    import torch

    class Method:
        def __init__(self, out: float, dq: float) -> None:
            self.out, self.dq = torch.tensor([out]), torch.tensor([dq])

        def forward(self) -> torch.Tensor:
            return self.out

        def backward(self) -> list[torch.Tensor]:
            return [self.dq]

    methods = {peers.OURS: Method(1.0, 3.0), "a": Method(1.0, 3.0), "b": Method(1.0, 4.0)}
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
    dense = peers.Case("window", 1, 64, 4, 4, 64, causal=False, window=31)
    packed = peers.Case("packed", 2, 90, 4, 4, 64, causal=True, lengths=(90, 33))
    rules: dict[str, dict[str, Any]] = {
        "dense": {"causal": False, "window_size": (31, 0)},
        "packed": {"causal": True, "window_size": (-1, -1)},
    }
    for side in "qk":
        rules["packed"].update({f"cu_seqlens_{side}": "starts", f"max_seqlen_{side}": 90})
    try:
        peers.add_cute(tmp_path)
        for kind, case in (("dense", dense), ("packed", packed)):
            inputs: Any = SimpleNamespace(case=case, qkv="qkv", cu_seqlens="starts")
            assert peers.FlashAttention4(inputs).out == (kind, rules[kind])
    finally:
        sys.modules.pop("flash_attn.cute", None)
        vars(flash_attn).pop("cute", None)
    assert flash_attn.flash_attn_func is ours
