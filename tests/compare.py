"""Tolerance by rule, and memory that shows what was never written.

A result passes when its largest error against the float64 oracle is at most twice the largest error
of the oracle's formula run in the result's own precision, plus a slack fixed per precision. Nobody
picks a tolerance per test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

ERROR_RATIO = 2.0

# Absolute slack per unit of the reference's magnitude, for when the low-precision run is exact by
# luck (one key, one term). In half precision eps/64; in float32 and float64, where results are no
# coarser than the sums behind them, 64 eps: reordered sums of a few hundred terms.
TINY = {
    torch.float64: 64 * 2.0**-52,
    torch.float32: 64 * 2.0**-23,
    torch.float16: 2.0**-10 / 64,
    torch.bfloat16: 2.0**-7 / 64,
}


def default_atol(reference: Tensor, dtype: torch.dtype) -> float:
    """The slack of the rule for a result in `dtype` whose true values are `reference`."""
    finite = reference[reference.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return TINY[dtype] * max(1.0, largest)


def _position(flat_index: int, shape: torch.Size) -> tuple:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_index), shape))


def _check_non_finite(name: str, got: Tensor, reference: Tensor) -> None:
    """NaN and infinities must stand exactly where the reference has them."""
    same = (got == reference) | (got.isnan() & reference.isnan())
    wrong = (~got.isfinite() | ~reference.isfinite()) & ~same
    if wrong.any():
        at = _position(int(wrong.flatten().int().argmax()), wrong.shape)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values are NaN or infinite where the "
            f"reference is not, or the reverse; first at {at}: got {got[at].item()}, "
            f"expected {reference[at].item()}"
        )


def check(
    name: str,
    got: Tensor,
    reference: Tensor,
    low_precision: Tensor,
    atol: Optional[float] = None,
) -> float:
    """Assert that `got` obeys the rule; return its error as a multiple of the allowed one.

    `reference` is the oracle's float64 result and `low_precision` the oracle's run in the precision
    of the problem; `atol` defaults to `default_atol` of that precision.
    """
    if got.shape != reference.shape or reference.shape != low_precision.shape:
        shapes = [tuple(x.shape) for x in (got, reference, low_precision)]
        raise AssertionError(f"{name}: shapes of got, reference, low precision differ: {shapes}")
    assert reference.dtype == torch.float64, f"{name}: reference is {reference.dtype}"
    if atol is None:
        atol = default_atol(reference, low_precision.dtype)
    got, reference, low_precision = (
        x.detach().to("cpu", torch.float64) for x in (got, reference, low_precision)
    )
    if got.numel() == 0:
        return 0.0
    _check_non_finite(name, got, reference)
    finite = reference.isfinite()
    error = torch.where(finite, (got - reference).abs(), 0.0)
    yardstick = torch.where(finite, (low_precision - reference).abs(), 0.0)
    allowed = ERROR_RATIO * float(yardstick.max()) + atol
    worst = int(error.flatten().argmax())
    largest = float(error.flatten()[worst])
    if not largest <= allowed:
        at = _position(worst, error.shape)
        raise AssertionError(
            f"{name}: error {largest:.3e} at {at} of {tuple(error.shape)} is "
            f"{largest / allowed:.3g} times the allowed {allowed:.3e} "
            f"(low precision {float(yardstick.max()):.3e}, atol {atol:.1e}); "
            f"got {got[at].item():.9g}, expected {reference[at].item():.9g}; "
            f"{int((error > allowed).sum())} of {error.numel()} values are out"
        )
    return largest / allowed if allowed else 0.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` inside is filled with NaN, so a value never written cannot look right."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
