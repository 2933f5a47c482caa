"""Which backend runs a call, and why each other one does not.

A backend is a module with `why_not(problem)`, the reasons why it cannot run a problem (none: it
can), and, where it can run any, `forward(call, name)`, `backward(call, name)` and
`combine(out_partial, lse_partial)`. `_support.BACKENDS` lists them, best first.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType
from typing import Optional

from torch import Tensor

from flash_attn import _env, _support
from flash_attn._problem import Backward, Forward, Problem
from flash_attn.backends import cpu, cuda, triton

_MODULES: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu}


def explain(problem: Problem) -> list[tuple[str, list[str]]]:
    """(backend, reasons why it is not taken) for each backend, best first; the first one without
    reasons runs.
    """
    return [
        (row.name, _excluded(row, problem) + _MODULES[row.name].why_not(problem))
        for row in _support.BACKENDS
    ]


def choose(problem: Problem, name: str = "flash_attn") -> str:
    """The backend that runs `problem`; `name` is the function in messages.

    Raises:
        RuntimeError: none does; the message lists every backend with its reasons and the remedy.
    """
    rows = explain(problem)
    for backend, reasons in rows:
        if not reasons:
            return backend
    told = "\n".join(f"  {backend}: {'; '.join(reasons)}" for backend, reasons in rows)
    raise RuntimeError(
        f"{name}: no backend of this installation runs: {problem}\n{told}\n"
        f"hint: {_hint(problem.device_type)}; `python -m flash_attn` shows what is installed."
    )


def _hint(device_type: str) -> str:
    """What a user may do about it, the likeliest first."""
    hints = []
    setting = _setting_in_force(device_type)
    if setting is not None:
        hints.append(f"unset {setting} to let the installation choose")
    if device_type == "cuda":
        hints.append(cuda.REMEDY)
    if device_type != "cpu":
        hints.append("move the tensors to the CPU (`.cpu()`), which every installation serves")
    return ", or ".join(hints) or "see the reasons above"


def forward(call: Forward, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask) by the backend that fits; `name` is the op in messages."""
    result: tuple[Tensor, Tensor, Tensor] = _backend_for(call.problem(), name).forward(call, name)
    return result


def backward(call: Backward, name: str) -> Tensor:
    """softmax_d by the backend that fits; the call's dq, dk and dv are written in place."""
    result: Tensor = _backend_for(call.problem(), name).backward(call, name)
    return result


def combine(out_partial: Tensor, lse_partial: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of partial results over the keys, float32."""
    device_type = out_partial.device.type
    for row in _support.BACKENDS:
        module = _MODULES[row.name]
        if hasattr(module, "combine") and not _excluded_for(row, device_type):
            result: tuple[Tensor, Tensor] = module.combine(out_partial, lse_partial)
            return result
    raise RuntimeError(
        f"{name}: no backend of this installation serves {out_partial.device}\n"
        f"hint: {_hint(device_type)}"
    )


def _backend_for(problem: Problem, name: str) -> ModuleType:
    chosen = _cached_choice(problem, name, forced_backend(), prefers_triton())
    if _env.FLASH_ATTN_LOG.get():
        _log_once(problem, chosen, name)
    return _MODULES[chosen]


def forced_backend() -> Optional[str]:
    """The backend that `FLASH_ATTN_BACKEND` names, or None."""
    name = _env.FLASH_ATTN_BACKEND.get()
    return None if name == "auto" else name


def prefers_triton() -> Optional[bool]:
    """`FLASH_ATTENTION_USE_FLAGGEMS`: Triton (True) or CUDA (False) for GPU tensors, or None."""
    return _env.FLASH_ATTENTION_USE_FLAGGEMS.get()


def _setting_in_force(device_type: str) -> Optional[str]:
    """The environment variable, with its value, that decides for tensors of a device type."""
    forced, use_triton = forced_backend(), prefers_triton()
    if forced is not None:
        return f"FLASH_ATTN_BACKEND={forced}"
    if use_triton is not None and device_type != "cpu":
        return f"FLASH_ATTENTION_USE_FLAGGEMS={str(use_triton).upper()}"
    return None


def _excluded_for(row: _support.BackendSupport, device_type: str) -> list[str]:
    """Reasons that the environment and the device give."""
    reasons = []
    setting = _setting_in_force(device_type)
    wanted = forced_backend() or ("triton" if prefers_triton() else "cuda")
    if setting is not None and row.name != wanted:
        reasons.append(f"{setting} asks for another")
    if device_type not in row.device_types:
        reasons.append(f"takes {', '.join(row.device_types)} tensors, not {device_type}")
    return reasons


def _excluded(row: _support.BackendSupport, problem: Problem) -> list[str]:
    """Reasons that the environment and the truth table give."""
    reasons = _excluded_for(row, problem.device_type)
    if problem.dtype not in row.dtypes:
        reasons.append(f"takes {', '.join(row.dtypes)}, not {problem.dtype}")
    missing = sorted(problem.features - row.features) if row.features else []
    if missing:
        reasons.append(f"lacks {', '.join(missing)}")
    return reasons


@lru_cache(maxsize=1024)
def _cached_choice(
    problem: Problem, name: str, forced: Optional[str], use_triton: Optional[bool]
) -> str:
    """`choose`, remembered; the environment is part of the key because `choose` reads it."""
    return choose(problem, name)


@lru_cache(maxsize=1024)
def _log_once(problem: Problem, chosen: str, name: str) -> None:
    print(f"flash_attn: {name} on {chosen}: {problem}", file=sys.stderr)
