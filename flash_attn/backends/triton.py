"""The Triton backend's place: it says what is missing until a release carries its kernels."""

from __future__ import annotations

from flash_attn._problem import Problem


def why_not(problem: Problem) -> list[str]:
    """This release carries no Triton kernels, whether Triton is installed or not."""
    return ["this release carries no Triton kernels"]
