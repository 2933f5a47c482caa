"""The CPU backend: exact attention in plain torch, blockwise, every feature, any torch build."""

from __future__ import annotations

from flash_attn._cpu.attention import backward, combine, forward
from flash_attn._problem import Problem

__all__ = ["backward", "combine", "forward", "why_not"]


def why_not(problem: Problem) -> list[str]:
    """Nothing beyond the truth table keeps a problem from the CPU."""
    return []
