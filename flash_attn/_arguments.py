"""What the public functions check themselves, because they read it before an operator does, and
the one style of error messages: function, rule, what was given.

Published rules keep their published exception (RuntimeError) and wording, because callers match on
both.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn, Optional

import torch
from torch import Tensor


def fail(name: str, rule: str, got: str, kind: type[Exception] = RuntimeError) -> NoReturn:
    """Raise `kind` with the one message style of the package."""
    raise kind(f"{name}: {rule}; got {got}")


# What torch says of an argument that an operator's schema does not let through.
_WRONG_TYPE = re.compile(
    r"(?s)\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
)


def renamed(error: Exception, op: str, name: str) -> Exception:
    """`error` as raised for the public function `name` rather than for the op it called."""
    message = str(error)
    if message.startswith(f"{op}: "):
        return type(error)(name + message[len(op) :])
    wrong = _WRONG_TYPE.match(message, len(op)) if message.startswith(f"{op}()") else None
    if wrong is None:
        return error
    return type(error)(f"{name}: {wrong[2]} must be of type {wrong[1]}; got {wrong[3]}")


def check_tensors(name: str, **arguments: Any) -> None:
    """What is read before the operator's own checks must at least be a tensor."""
    for argument, x in arguments.items():
        if not isinstance(x, Tensor):
            fail(name, f"{argument} must be a tensor", type(x).__name__, TypeError)


def check_optional_tensors(name: str, **arguments: Any) -> None:
    """As `check_tensors`, where None stands for no tensor."""
    for argument, x in arguments.items():
        if x is not None and not isinstance(x, Tensor):
            fail(name, f"{argument} must be a tensor or None", type(x).__name__, TypeError)


def window(name: str, window_size: Any) -> tuple[int, int]:
    """`window_size` as (left, right)."""
    rule = "window_size must be (left, right), numbers of keys, -1 for no bound"
    try:
        left, right = window_size
    except (TypeError, ValueError):
        fail(name, rule, repr(window_size), ValueError)
    for bound in (left, right):
        if not _is_int(bound):
            fail(name, rule, repr(window_size), TypeError)
    return left, right


def is_positive(name: str, argument: str, x: Any) -> bool:
    """Whether a number that is compared before an operator's schema sees it lies above 0."""
    try:
        return bool(x > 0)
    except TypeError:
        fail(name, f"{argument} must be of type float", type(x).__name__, TypeError)


def scale(given: Optional[float], q: Tensor, qv: Optional[Tensor] = None) -> float:
    """softmax_scale; None is d ** -0.5, or (d + dv) ** -0.5 with a second query."""
    if given is not None:
        return given
    head_dim = q.shape[-1] if q.dim() > 0 else 0
    if qv is not None and qv.dim() > 0:
        head_dim += qv.shape[-1]
    return float(head_dim**-0.5) if head_dim > 0 else 1.0  # 1: the shape is refused later


def check_optional_float_dtype(name: str, **arguments: Any) -> None:
    for argument, x in arguments.items():
        if x is not None and not (isinstance(x, torch.dtype) and x.is_floating_point):
            fail(name, f"{argument} must be a torch dtype of floats or None", repr(x), TypeError)


def check_packed(name: str, argument: str, x: Tensor, count: int, rank: int) -> None:
    """A packed tensor: (b, s, count, h, d) of rank 5, or (total, count, h, d) of rank 4."""
    if x.dim() != rank or x.shape[-3] != count:
        lead = "total" if rank == 4 else "batch_size, seqlen"
        fail(
            name,
            f"{argument} must have shape ({lead}, {count}, num_heads, head_size)",
            f"shape {tuple(x.shape)}",
        )


def _is_int(x: Any) -> bool:
    return isinstance(x, int) or hasattr(x, "__index__")


def check_int(name: str, argument: str, x: Any, kind: str = "an int") -> None:
    if not _is_int(x):
        fail(name, f"{argument} must be {kind}", type(x).__name__, TypeError)


def check_num_splits(name: str, num_splits: int, limit: int) -> None:
    check_int(name, "num_splits", num_splits)
    if num_splits > limit:
        fail(name, f"num_splits > {limit} not supported", f"num_splits {num_splits}")
    if num_splits < 0:
        fail(name, "num_splits must be 0 (choose) or positive", f"{num_splits}", ValueError)


def check_sm_margin(name: str, sm_margin: int) -> None:
    check_int(name, "sm_margin", sm_margin)
    if sm_margin < 0:
        fail(name, "sm_margin must be 0 or positive", f"{sm_margin}", ValueError)
