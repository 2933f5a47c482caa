"""Calls of other devices, checked as those of the CPU are: what FLASH_ATTN_DEBUG asks for."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flash_attn._cpu.append import plan_append
from flash_attn._cpu.pieces import cut
from flash_attn._problem import Append, Backward, Forward, Sequences

T = TypeVar("T", Append, Sequences)


def check_tables(call: Forward | Backward, name: str) -> None:
    """ValueError if a length, offset, index or position in a table of the call points outside.

    Kernels clamp what they find, and cannot tell. This waits for the device; calls that a CUDA
    graph captures cannot be looked at and pass.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    call = replace(call, sequences=_on_cpu(call.sequences))
    if isinstance(call, Forward) and call.append is not None:
        plan_append(replace(call, append=_on_cpu(call.append, ("k", "v"))), name)
        return
    for _ in cut(call, name):
        pass


def _on_cpu(tables: T, kept: tuple[str, ...] = ()) -> T:
    """The tensors of a dataclass on the CPU, but for those `kept`."""
    found: dict[str, Any] = {field.name: getattr(tables, field.name) for field in fields(tables)}
    for key, x in found.items():
        if isinstance(x, Tensor) and key not in kept:
            found[key] = x.cpu()
    return replace(tables, **found)
