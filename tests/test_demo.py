"""The demo and the benchmark, at sizes that take seconds."""

from __future__ import annotations

import io
from pathlib import Path

import demo
import pytest
import quickstart
import torch
from measure import METHODS, PASSES, SCORES, Case, measure
from rich.console import Console

EXAMPLES = list(quickstart.examples())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.title.replace(" ", "_"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_example_follows_the_rule(example: quickstart.Example, dtype: torch.dtype) -> None:
    assert demo.run_example(example, quickstart.text_inputs("cpu", dtype)).passed


def test_a_wrong_result_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = quickstart.Example(
        "wrong", "", lambda x: EXAMPLES[0].run(x) * 1.05, EXAMPLES[0].standard
    )
    monkeypatch.setattr(demo, "examples", lambda: iter((*EXAMPLES[:1], wrong)))
    text = io.StringIO()
    assert not demo.run_quickstart(Console(file=text, width=80), "cpu")
    assert "FAIL" in text.getvalue()


def test_growth_prints_a_table_and_draws_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LENGTHS", {"cpu": (96,)})
    text, picture = io.StringIO(), tmp_path / "new" / "demo.png"
    assert demo.run_growth(Console(file=text, width=80), "cpu", picture)
    rows = [line.split() for line in text.getvalue().splitlines() if "fwd" in line]
    assert [row[0] for row in rows] == ["96", "fwd+bwd"]
    assert "…" not in text.getvalue(), "a column is cut at 80 columns"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_standard_attention_needs_quadratic_memory_and_flash_attn_does_not() -> None:
    def extra_bytes(method: str) -> int:
        return measure(Case(method, "fwd", "causal, softcap", 4096, 1, 64, "float32")).extra_bytes

    one_matrix = 4 * 4096**2
    assert extra_bytes("standard") > one_matrix > extra_bytes("flash_attn")


def test_a_failing_measurement_says_which_case_and_why() -> None:
    case = Case("flash_attn", "fwd", "full", 64, 1, 64, "int32")
    with pytest.raises(RuntimeError, match=r"^flash_attn, length 64: .*Int"):
        measure(case)


def test_only_sdpa_lacks_softcap() -> None:
    lacking = {
        (method, scores)
        for method in METHODS
        for scores in SCORES
        if not Case(method, PASSES[0], scores, 64, 1, 64, "float32").is_possible
    }
    assert lacking == {("torch SDPA", "causal, softcap")}
