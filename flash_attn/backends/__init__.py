"""Which backend runs a call, and why each other one does not.

A backend is a module with `why_not(problem)`, the reasons why it cannot run a problem (none: it
can), `forward(call, name)`, `backward(call, name)` and `combine(out_partial, lse_partial)`.
`_support.BACKENDS` lists them, best first.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType
from typing import Optional

from torch import Tensor

from flash_attn import _env, _support
from flash_attn._cpu.debug import check_tables
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
        ImportError: the same, where the environment asks for Triton and it is not installed.
    """
    rows = explain(problem)
    for backend, reasons in rows:
        if not reasons:
            return backend
    told = "\n".join(f"  {backend}: {'; '.join(reasons)}" for backend, reasons in rows)
    lacks_triton = triton.NOT_INSTALLED in dict(rows)["triton"]
    kind = (
        ImportError if lacks_triton and _wanted(problem.device_type) == "triton" else RuntimeError
    )
    raise kind(
        f"{name}: no backend of this installation runs: {problem}\n{told}\n"
        f"hint: {_hint(problem)}; `python -m flash_attn` shows what is installed."
    )


def _hint(problem: Problem) -> str:
    """What a user may do about it, the likeliest first."""
    hints = []
    device_type = problem.device_type
    setting = _setting_in_force(device_type)
    if setting is not None:
        hints.append(f"unset {setting} to let the installation choose")
    wanted = _wanted(device_type)
    if device_type == "cuda" and wanted in (None, "cuda"):
        hints.append(cuda.remedy(problem))
    may_take = device_type != "cpu" and wanted in (None, "triton") and not problem.is_latent
    if may_take and not triton.is_installed():
        hints.append(triton.REMEDY)
    if device_type != "cpu":
        hints.append("move the tensors to the CPU (`.cpu()`), which every installation serves")
    return ", or ".join(hints) or "see the reasons above"


def forward(call: Forward, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask) by the backend that fits; `name` is the op in messages."""
    backend = _backend_for(call.problem(), name)
    _debug(backend, call, name)
    result: tuple[Tensor, Tensor, Tensor] = backend.forward(call, name)
    return result


def backward(call: Backward, name: str) -> Tensor:
    """softmax_d by the backend that fits; the call's dq, dk and dv are written in place."""
    backend = _backend_for(call.problem(), name)
    _debug(backend, call, name)
    result: Tensor = backend.backward(call, name)
    return result


def _debug(backend: ModuleType, call: Forward | Backward, name: str) -> None:
    """With FLASH_ATTN_DEBUG, what the CPU backend always checks."""
    if backend is not cpu and _env.FLASH_ATTN_DEBUG.get():
        check_tables(call, name)


def combine(out_partial: Tensor, lse_partial: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of partial results over the keys, float32."""
    device_type, head_dim = out_partial.device.type, out_partial.shape[-1]
    problem = Problem(device_type, "float32", head_dim, head_dim)
    for row in _support.BACKENDS:
        module = _MODULES[row.name]
        if not _excluded_for(row, device_type) and not module.why_not(problem):
            result: tuple[Tensor, Tensor] = module.combine(out_partial, lse_partial)
            return result
    raise RuntimeError(
        f"{name}: no backend of this installation serves {out_partial.device}\n"
        f"hint: {_hint(problem)}"
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


def _wanted(device_type: str) -> Optional[str]:
    """The backend that the environment asks for on a device type, or None."""
    forced, use_triton = forced_backend(), prefers_triton()
    if forced is not None or use_triton is None or device_type == "cpu":
        return forced
    return "triton" if use_triton else "cuda"


def _setting_in_force(device_type: str) -> Optional[str]:
    """The environment variable, with its value, that decides for tensors of a device type."""
    if _wanted(device_type) is None:
        return None
    if forced_backend() is not None:
        return f"FLASH_ATTN_BACKEND={forced_backend()}"
    name, text = _env.FLASH_ATTENTION_USE_FLAGGEMS.setting() or ("", "")
    return f"{name}={text.upper()}"


def _excluded_for(row: _support.BackendSupport, device_type: str) -> list[str]:
    """Reasons that the environment and the device give."""
    reasons = []
    if _wanted(device_type) not in (None, row.name):
        reasons.append(f"{_setting_in_force(device_type)} asks for another")
    is_interpreted = row.name == "triton" and triton.takes(device_type)
    if device_type not in row.device_types and not is_interpreted:
        reasons.append(f"takes {', '.join(row.device_types)} tensors, not {device_type}")
    return reasons


def _excluded(row: _support.BackendSupport, problem: Problem) -> list[str]:
    """Reasons that the environment and the truth table give."""
    reasons = _excluded_for(row, problem.device_type)
    if problem.dtype not in row.dtypes:
        reasons.append(f"takes {', '.join(row.dtypes)}, not {problem.dtype}")
    missing = sorted(problem.features - row.features)
    if missing:
        reasons.append(f"lacks {', '.join(missing)}")
    missing = sorted(problem.features & row.not_in_fp8) if "fp8" in problem.features else []
    if missing:
        reasons.append(f"lacks {', '.join(missing)} with FP8 inputs")
    missing = sorted(problem.features & row.not_in_latent) if problem.is_latent else []
    if missing:
        widest = _support.MAX_HEAD_DIM
        reasons.append(f"lacks {', '.join(missing)} with qv or V wider than {widest}")
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
