"""What tests of other projects' calls share: small tensors, and agreement with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compare import check
from oracle import attention
from torch import Tensor

FP32 = torch.float32
SCALE = 0.25
# Names of `flash_attn.flash_attn_interface` that others import.
PRIVATE = [
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
]


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def dense(b: int = 2, s: int = 12, hq: int = 4, hk: int = 2, d: int = 16) -> list[Tensor]:
    return tensors((b, s, hq, d), (b, s, hk, d), (b, s, hk, d))


def starts_of(*lengths: int) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def agrees(got: Tensor, oracle: Callable[..., Any], *args: Any, **options: Any) -> None:
    """`got` against the oracle's first result, by the tolerance rule."""
    runs = [oracle(*args, **options, dtype=dtype)[0] for dtype in (torch.float64, FP32)]
    check("out", got, runs[0], runs[1])


def gradients_agree(got: list[Tensor], dout: Tensor, inputs: list[Tensor], **options: Any) -> None:
    """dq, dk, dv against the oracle's, by the tolerance rule."""
    runs = []
    for dtype in (torch.float64, FP32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, _ = attention(*leaves, **options, dtype=dtype)
        runs.append(torch.autograd.grad(out, leaves, dout.to(dtype)))
    for name, *three in zip(("dq", "dk", "dv"), got, *runs):
        check(name, *three)
