"""The training benchmark, as far as it runs without a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import training

SIZE = training.Size(
    layers=1,
    heads=2,
    head_dim=32,
    vocabulary=32,
    batch=2,
    seqlen=64,
    steps=12,
    learning_rate=1e-3,
)


def test_tokens_follow_a_rule_but_for_one_in_ten() -> None:
    first, *others = training.batches(replace(SIZE, seqlen=2000), "cpu")
    pairs = [list(zip(row[:-1].tolist(), row[1:].tolist())) for row in first]
    rule: dict[int, list[int]] = {}
    for before, after in pairs[0]:
        rule.setdefault(before, []).append(after)
    usual = {before: max(set(found), key=found.count) for before, found in rule.items()}
    kept = [usual[before] == after for row in pairs for before, after in row]
    assert sum(kept) / len(kept) == pytest.approx(0.9, abs=0.02)
    assert len(others) == SIZE.steps - 1
    assert not torch.equal(first, others[0])


def test_the_loss_falls_and_does_so_alike_with_another_attention() -> None:
    data = list(training.batches(SIZE, "cpu"))
    ours = training.train(SIZE, training.ours, data, "cpu")
    theirs = training.train(SIZE, training.sdpa(""), data, "cpu")
    assert len(ours["ms"]) == len(ours["losses"]) == SIZE.steps
    assert ours["losses"][0] == pytest.approx(math.log(SIZE.vocabulary), abs=0.7)
    assert ours["losses"][-1] < ours["losses"][0] - 0.3
    assert max(abs(x - y) for x, y in zip(ours["losses"], theirs["losses"])) < 0.02
