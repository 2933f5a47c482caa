"""The CUDA backend's place: it says what is missing until a release carries its kernels."""

from __future__ import annotations

from flash_attn._problem import Problem

REMEDY = (
    "install a release with CUDA kernels once there is one "
    "(`pip install --upgrade --force-reinstall flash-attn`), or meanwhile "
)


def why_not(problem: Problem) -> list[str]:
    """This release carries no compiled kernels, whatever the device."""
    return ["this release carries no compiled CUDA kernels"]
