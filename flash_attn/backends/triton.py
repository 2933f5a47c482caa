"""The Triton backend: any GPU that Triton serves, and under its interpreter the CPU.

Triton, and the kernels with it, are imported by the first call that runs on them.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from flash_attn import _env, _support
from flash_attn._problem import Backward, Forward, Problem

REMEDY = "install Triton (`pip install 'triton>=3.0'`; torch's builds for Linux GPUs bring it)"
NOT_INSTALLED = "Triton is not installed"


@lru_cache
def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes(device_type: str) -> bool:
    """Whether it runs on tensors of a device type, if Triton is there: CPU tensors only where
    Triton interprets its kernels and the environment asks for this backend.
    """
    if device_type == "cpu":
        return _env.FLASH_ATTN_BACKEND.get() == "triton" and _env.TRITON_INTERPRET.get()
    return device_type in _support.backend_support("triton").device_types


def serves(x: Tensor) -> bool:
    """Whether an operation of `flash_attn.ops.triton` runs its own kernel on x. Torch computes it
    otherwise: on the CPU, in float64, without Triton, and for compilers and modes, which make
    kernels of what they see.
    """
    if torch.compiler.is_compiling():  # first: not every compiler can trace the rest
        return False
    return (
        takes(x.device.type)
        and is_installed()
        and type(x) in (Tensor, Parameter)
        and x.dtype != torch.float64
        and not torch._C._are_functorch_transforms_active()
    )


def require(name: str) -> None:
    """ImportError unless Triton is installed; `name` is what needs it."""
    if not is_installed():
        raise ImportError(f"{name}: {NOT_INSTALLED}\nhint: {REMEDY}")


def why_not(problem: Problem) -> list[str]:
    """What keeps this installation from running a problem on a device that it takes."""
    if not is_installed():
        return [NOT_INSTALLED]
    widest = max(problem.head_dim, problem.head_dim_v)
    if widest > _support.MAX_HEAD_DIM:
        return [f"takes head dims up to {_support.MAX_HEAD_DIM}, not {widest}"]
    return []


def _kernels() -> ModuleType:
    from flash_attn._triton import attention

    return attention


def forward(call: Forward, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask) by the Triton kernels."""
    result: tuple[Tensor, Tensor, Tensor] = _kernels().forward(call)
    return result


def backward(call: Backward, name: str) -> Tensor:
    """softmax_d; the call's dq, dk and dv are written in place."""
    result: Tensor = _kernels().backward(call)
    return result


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over parts of the keys, float32."""
    result: tuple[Tensor, Tensor] = _kernels().combine(out_partial, lse_partial)
    return result
