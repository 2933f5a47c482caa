"""Layer norm and RMS norm over rows, with a residual added first; forward and backward."""

from __future__ import annotations

from typing import Optional

import torch
import triton.language as tl
from torch import Tensor

from flash_attn._triton.launch import Config, launch, num_processors, padded
from flash_attn._triton.numbers import kernel, narrow, wide

MAX_WIDTH = 32768  # a program holds a row


@kernel
def norm_kernel(
    x, residual, z, y, weight, bias, mean, rstd, x_s, residual_s, z_s, y_s, num_columns, eps,
    shift, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    IS_RMS: tl.constexpr,
):  # fmt: skip
    """z = x + residual and y = norm(z) * (weight + shift) + bias. Grid: rows."""
    row = tl.program_id(0)
    j = tl.arange(0, WIDTH)
    is_there = j < num_columns
    value = tl.load(x + wide(row) * x_s + j, mask=is_there, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(residual + wide(row) * residual_s + j, mask=is_there, other=0.0)
        value += added.to(tl.float32)
    if z is not None:
        tl.store(z + wide(row) * z_s + j, narrow(value, z.dtype.element_ty), mask=is_there)
    if not IS_RMS:
        row_mean = tl.sum(value, 0) / num_columns
        tl.store(mean + row, row_mean)
        value = tl.where(is_there, value - row_mean, 0.0)
    row_rstd = 1.0 / tl.sqrt(tl.sum(value * value, 0) / num_columns + eps)
    tl.store(rstd + row, row_rstd)
    value *= row_rstd
    if weight is not None:
        value *= tl.load(weight + j, mask=is_there, other=0.0).to(tl.float32) + shift
    if bias is not None:
        value += tl.load(bias + j, mask=is_there, other=0.0).to(tl.float32)
    tl.store(y + wide(row) * y_s + j, narrow(value, y.dtype.element_ty), mask=is_there)


@kernel
def gradient_kernel(
    dx, dz, dy, z, weight, mean, rstd, dweights, dbiases, dx_s, dz_s, dy_s, z_s, num_columns,
    num_rows, rows_each, shift, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, IS_RMS: tl.constexpr,
):  # fmt: skip
    """dx, and each program's part of the gradients of weight and bias. Grid: stretches of rows."""
    program = tl.program_id(0)
    j = tl.arange(0, WIDTH)
    is_there = j < num_columns
    scale = tl.full([WIDTH], 1.0, tl.float32)
    if weight is not None:
        scale = tl.load(weight + j, mask=is_there, other=0.0).to(tl.float32) + shift
    dweight, dbias = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for row in range(program * rows_each, tl.minimum((program + 1) * rows_each, num_rows)):
        normed = tl.load(z + wide(row) * z_s + j, mask=is_there, other=0.0).to(tl.float32)
        grad = tl.load(dy + wide(row) * dy_s + j, mask=is_there, other=0.0).to(tl.float32)
        row_rstd = tl.load(rstd + row)
        if not IS_RMS:
            normed -= tl.load(mean + row)
        normed = tl.where(is_there, normed * row_rstd, 0.0)
        dweight += grad * normed
        dbias += grad
        grad *= scale
        along = tl.sum(grad * normed, 0) / num_columns
        if not IS_RMS:
            grad -= tl.sum(grad, 0) / num_columns
        grad = (grad - along * normed) * row_rstd
        if dz is not None:
            added = tl.load(dz + wide(row) * dz_s + j, mask=is_there, other=0.0)
            grad += added.to(tl.float32)
        tl.store(dx + wide(row) * dx_s + j, narrow(grad, dx.dtype.element_ty), mask=is_there)
    if dweights is not None:
        tl.store(dweights + wide(program) * num_columns + j, dweight, mask=is_there)
    if dbiases is not None:
        tl.store(dbiases + wide(program) * num_columns + j, dbias, mask=is_there)


def _tiles(width: int) -> tuple[Config, ...]:
    # 4, 8 and 16 warps for 4096 columns are not apart (docs/kernels/triton.md).
    return (Config(1, 16, min(max(width // 512, 1), 16), 1),)


def norm(
    x: Tensor,
    residual: Optional[Tensor],
    z_dtype: Optional[torch.dtype],
    y_dtype: torch.dtype,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    shift: float,
    eps: float,
    is_rms: bool,
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor], Tensor]:
    """(y, z, mean, rstd) of x (rows, n); z, the sum, in `z_dtype`, or None."""
    num_rows, n = x.shape
    y = x.new_empty(x.shape, dtype=y_dtype)
    z = None if z_dtype is None else x.new_empty(x.shape, dtype=z_dtype)
    mean = None if is_rms else x.new_empty(num_rows, dtype=torch.float32)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    args = {
        "x": x, "residual": residual, "z": z, "y": y, "weight": weight, "bias": bias,
        "mean": mean, "rstd": rstd,
        "x_s": x.stride(0),
        "residual_s": 0 if residual is None else residual.stride(0),
        "z_s": n, "y_s": n,
        "num_columns": n,
        "eps": eps,
        "shift": shift,
        "WIDTH": padded(n),
        "IS_RMS": is_rms,
    }  # fmt: skip
    launch(norm_kernel, _tiles(padded(n)), "rows", 1, num_rows, x.device, args)
    return y, z, mean, rstd


def gradients(
    dy: Tensor,
    dz: Optional[Tensor],
    z: Tensor,
    mean: Optional[Tensor],
    rstd: Tensor,
    weight: Optional[Tensor],
    has_bias: bool,
    shift: float,
    dx_dtype: torch.dtype,
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """(dx, dweight, dbias), the last two in float32; sums have a fixed order."""
    num_rows, n = z.shape
    dx = z.new_empty(z.shape, dtype=dx_dtype)
    programs = max(1, min(num_rows, 4 * num_processors(z.device)))
    num_sums = (weight is not None) + has_bias
    parts = z.new_empty((num_sums, programs, n), dtype=torch.float32)
    dweights = None if weight is None else parts[0]
    dbiases = parts[-1] if has_bias else None
    args = {
        "dx": dx, "dz": dz, "dy": dy, "z": z, "weight": weight, "mean": mean, "rstd": rstd,
        "dweights": dweights, "dbiases": dbiases,
        "dx_s": n, "dz_s": 0 if dz is None else dz.stride(0),
        "dy_s": dy.stride(0), "z_s": z.stride(0),
        "num_columns": n,
        "num_rows": num_rows,
        "rows_each": -(-num_rows // programs),
        "shift": shift,
        "WIDTH": padded(n),
        "IS_RMS": mean is None,
    }  # fmt: skip
    launch(gradient_kernel, _tiles(padded(n)), "rows", 1, programs, z.device, args)
    sums = parts.sum(1)
    return dx, None if weight is None else sums[0], sums[-1] if has_bias else None
