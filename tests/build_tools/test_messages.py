"""docs/installing.md lists errors by their text: those of this project are what its code says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from native_tools import ROOT

TEXT = (ROOT / "docs" / "installing.md").read_text("utf-8")
ROWS = TEXT[TEXT.index("## Troubleshooting") :].splitlines()
SHOWN = [
    shown
    for row in ROWS
    if row.startswith("| ") and not row.startswith("| Shown")
    for shown in re.findall(r"`([^`]+)`", row.split(" | ")[0])
]
# What other programs say.
FOREIGN = {
    "ModuleNotFoundError: No module named 'torch'",
    "packaging",
    "psutil",
    "wheel",
    "undefined symbol: _ZN3c10...",
    "ImportError: ... flash_attn_2_cuda...so",
    "No matching distribution found for flash-attn==2.8.3",
    "is not a supported wheel on this platform",
    "has inconsistent version: expected '2.8.3+cu12torch...'",
    "Building wheel for flash-attn ...",
    "Killed",
    "Killed signal terminated program cc1plus",
    "version 'GLIBC_2.32' not found",
    "GLIBCXX_3.4.30 not found",
    "Tried to register an operator (flash_attn_3::fwd...",
    "Filename too long",
    "Stat(...): Filename longer than 260 characters",
    "Microsoft Visual C++ 14.0 or greater is required",
    "no kernel image is available for execution on the device",
    "The detected CUDA version (...) mismatches the version that was used to compile PyTorch",
    "CUDA_HOME environment variable is not set",
    "Connection refused",
    "timed out",
    "certificate verify failed",
    "THESE PACKAGES DO NOT MATCH THE HASHES",
    "OSError: [Errno 18] Invalid cross-device link",
    "the package flash_attn seems to be not installed",
    "the package for FlashAttention3 doesn't seem to be installed",
    "is not available",
}

# What a message is filled with in the examples of the table.
VALUES = ("2.8.3", "12.8", "404", "No space left on device", "flash_attn_func")


def texts() -> Iterator[str]:
    """The strings of the project's code, with three dots for what they are filled with."""
    for folder in ("build_tools", "flash_attn"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "..."
                        for part in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    for path in (ROOT / "csrc" / "host").glob("*.cpp"):
        yield re.sub(r"%\w+", "...", path.read_text("utf-8"))


CODE = "\n".join(texts())


def is_said(shown: str) -> bool:
    """Whether some string has these words in this order, with anything where dots are."""
    pieces = [piece.strip() for piece in re.split(r"\.\.\.", shown) if piece.strip()]
    return re.search(".{0,80}".join(map(re.escape, pieces)), CODE) is not None


@pytest.mark.parametrize("shown", [shown for shown in SHOWN if shown not in FOREIGN])
def test_a_message_that_is_listed_is_one_that_is_said(shown: str) -> None:
    for value in VALUES:
        shown = shown.replace(value, "...")
    assert is_said(shown)


def test_what_other_programs_say_is_listed_and_not_said_here() -> None:
    assert set(SHOWN) >= FOREIGN
    assert not is_said("No module named 'torch' ever")
    assert len(set(SHOWN) - FOREIGN) >= 15
