"""Small inputs of calls that compilers, counters and transforms look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# torch's compilers warn about parts of torch itself, and torch 2.4's exporter about any operator.
COMPILES = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*"),
    pytest.mark.filterwarnings(r"ignore:.*torch\.cpu\.amp\.autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:At pre-dispatch tracing:UserWarning"),
]

# torch.compile warns about its own way of tracing an autograd.Function.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

OPS, OPS_3 = torch.ops.flash_attn, torch.ops.flash_attn_3
B, S, HQ, HK, D = 2, 9, 4, 2, 16
CU = torch.tensor([0, 4, 9], dtype=torch.int32)
# A name, a function, its tensors.
Row = tuple[str, Callable[..., Any], tuple[Tensor, ...]]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def dense() -> tuple[Tensor, ...]:
    return normal(B, S, HQ, D), normal(B, S + 3, HK, D), normal(B, S + 3, HK, D) + 1


def packed() -> tuple[Tensor, ...]:
    return normal(S, HQ, D), normal(S, HK, D), normal(S, HK, D) + 1


def equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected))
