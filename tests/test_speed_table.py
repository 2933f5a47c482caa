"""The README's table of speed says what the results say."""

from __future__ import annotations

from typing import Any

import pytest
import speed_table

HERE = {"device": "NVIDIA H100 80GB HBM3", "file": "a.json"}
THERE = {"device": "NVIDIA A100-SXM4-80GB", "file": "b.json"}


def peers_row(passes: str, ratio: float) -> dict[str, Any]:
    return {"passes": passes, "ratio": ratio, "tflops": {"flash_attn": 2.0, "FA": 1.0, "cuDNN": 1}}


RESULTS: dict[str, list[dict[str, Any]]] = {
    "peers": [
        {
            **HERE,
            "rows": [
                *(peers_row("fwd", ratio) for ratio in (0.5, 2.0)),
                peers_row("bwd", 1.5),
                peers_row("fwd+bwd", 1.25),
            ],
        }
    ],
    "fp8": [{**HERE, "rows": [{"ratio": 1.1, "tflops": {"flash_attn": 1, "FA": 1}}, {}]}],
    "decode": [
        {
            **THERE,
            "rows": [{"ratio": 0.9, "us": {"flash_attn": 1, "FA": 1, "FA, planned": 1}}],
            "latent": [],
        }
    ],
}


def test_a_line_says_mean_least_most_and_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_table, "results", lambda kind: RESULTS.get(kind, []))
    assert speed_table.speed_table().splitlines()[2:] == [
        "| A100-SXM4-80GB | a query over a cache | FA | 0.90 | 0.90 to 0.90 | 1 |",
        "| H100 | forward | FA, cuDNN | 1.00 | 0.50 to 2.00 | 2 |",
        "| H100 | backward | FA, cuDNN | 1.50 | 1.50 to 1.50 | 1 |",
        "| H100 | forward and backward | FA, cuDNN | 1.25 | 1.25 to 1.25 | 1 |",
        "| H100 | forward, FP8 | FA | 1.10 | 1.10 to 1.10 | 1 |",
    ]
