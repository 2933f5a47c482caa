"""Every Python example of README.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
IN_LATER_TORCH = "activate_flash_attention_impl"


def test_readme_has_examples() -> None:
    assert len(BLOCKS) >= 1


def test_examples_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    # One namespace, as for a reader who types them one after the other.
    names: dict[str, object] = {}
    for block in BLOCKS:
        if IN_LATER_TORCH in block and not hasattr(torch.nn.attention, IN_LATER_TORCH):
            continue
        exec(compile(block, str(README), "exec"), names)
    assert capsys.readouterr().err == ""
