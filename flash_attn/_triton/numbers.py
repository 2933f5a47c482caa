"""Numbers and products that every kernel uses."""

from __future__ import annotations

from typing import Any, Callable

import triton
import triton.language as tl

# Numbers of a call that make no kernel faster: they don't ask for one of their own.
_CHANGING = (
    "num_blocks", "num_splits", "room", "room_q", "room_k", "room_new", "rows_of_cache",
    "num_pages", "table_b", "slopes_b", "left", "right", "chunk", "offset", "step", "rows_of_table",
    "out_split", "lse_split", "lse_b", "lse_h", "delta_b", "delta_h",
    "first_class", "num_rows",
    "outs_split", "outs_b", "lses_split", "lses_b", "lses_h", "lses_s", "s_b", "s_h",
)  # fmt: skip


def kernel(function: Callable[..., None]) -> Any:
    """A function of Triton's that the host launches."""
    return triton.jit(function, do_not_specialize=_CHANGING)


VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _probe(x):
    return x


# TRITON_INTERPRET=1 was set when Triton was imported: kernels then run on the CPU, in numpy.
IS_INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)
# The interpreter keeps bfloat16 as 16-bit integers, and multiplies matrices of those as integers.
_WIDENS: tl.constexpr = tl.constexpr(IS_INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a b, in float32."""
    if _WIDENS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def product(a, b):
    """a b, in float32."""
    if _WIDENS:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def tanh(x):
    """Without a device library: each kind of GPU has another."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))


@triton.jit
def wide(x):
    """x in 64 bits, be it a tensor, a constant or a number of the interpreter's loops."""
    return tl.cast(x, tl.int64)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in another dtype, rounded to nearest; the interpreter cuts bfloat16 off."""
    if _WIDENS and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
