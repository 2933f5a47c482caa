"""Cross entropy over rows of logits: what a loss needs to know of a row, and the gradient."""

from __future__ import annotations

from typing import Optional

import torch
import triton.language as tl
from torch import Tensor

from flash_attn._triton.launch import Config, launch
from flash_attn._triton.numbers import LN_2, LOG2_E, kernel, narrow, wide

_TILES = (Config(1, 2048, 4, 1),)  # measured: docs/kernels/triton.md


@kernel
def rows_kernel(
    logits, labels, lse, at_label, total, logits_s, logits_d, num_columns, first_class, scale,
    num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of scaled logits: log-sum-exp, the one at the label (0 if it is not here) and, unless None,
    the sum. Grid: rows.
    """
    row = tl.program_id(0)
    logits += wide(row) * logits_s
    columns = tl.arange(0, COLUMNS)
    m = tl.full([COLUMNS], -float("inf"), tl.float32)
    exponentials = tl.zeros([COLUMNS], tl.float32)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, num_columns, COLUMNS):
        j = start + columns
        x = tl.load(logits + wide(j) * logits_d, mask=j < num_columns, other=-float("inf"))
        x = x.to(tl.float32) * scale
        if total is not None:
            sums += tl.where(j < num_columns, x, 0.0)
        x = tl.where(j < num_columns, x * LOG2_E, -float("inf"))
        new_m = tl.maximum(m, x)
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        exponentials = exponentials * tl.exp2(m - shift) + tl.exp2(x - shift)
        m = new_m
    largest = tl.max(m, 0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    row_sum = tl.sum(exponentials * tl.exp2(m - shift), 0)
    tl.store(lse + row, (largest + tl.log2(row_sum)) * LN_2)
    if total is not None:
        tl.store(total + row, tl.sum(sums, 0))
    label = tl.load(labels + row) - first_class
    is_here = (label >= 0) & (label < num_columns)
    x = tl.load(logits + wide(label) * logits_d, mask=is_here, other=0.0)
    tl.store(at_label + row, x.to(tl.float32) * scale)


@kernel
def gradient_kernel(
    out, logits, labels, lse, of_softmax, of_label, of_all, out_s, out_d, logits_s, logits_d,
    num_columns, first_class, scale, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """of_softmax * softmax - of_all, less of_label at the label. Grid: rows x blocks of columns."""
    row, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    is_there = j < num_columns
    x = tl.load(logits + wide(row) * logits_s + wide(j) * logits_d, mask=is_there, other=0.0)
    p = tl.exp2((x.to(tl.float32) * scale - tl.load(lse + row)) * LOG2_E)
    factor = tl.load(of_softmax + row)
    grad = tl.where(factor == 0.0, 0.0, factor * p)  # an ignored row may hold anything
    grad -= tl.load(of_all + row)
    label = tl.load(labels + row) - first_class
    grad -= tl.where(j == label, tl.load(of_label + row), 0.0)
    out += wide(row) * out_s + wide(j) * out_d
    tl.store(out, narrow(grad, out.dtype.element_ty), mask=is_there)


def rows(
    logits: Tensor, labels: Tensor, scale: float, first_class: int, needs_total: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """(lse, at_label, total) of logits (n, v), float32."""
    n, v = logits.shape
    lse, at_label = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    total = torch.empty_like(lse) if needs_total else None
    args = {
        "logits": logits, "labels": labels, "lse": lse, "at_label": at_label, "total": total,
        "logits_s": logits.stride(0), "logits_d": logits.stride(1),
        "num_columns": v,
        "first_class": first_class,
        "scale": scale,
    }  # fmt: skip
    launch(rows_kernel, _TILES, "rows", 1, n, logits.device, args)
    return lse, at_label, total


def gradient(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    first_class: int,
) -> None:
    """d loss / d logits into `out`, which may be `logits`, from the factors of each row."""
    n, v = logits.shape
    args = {
        "out": out, "logits": logits, "labels": labels, "lse": lse,
        "of_softmax": factors[0], "of_label": factors[1], "of_all": factors[2],
        "out_s": out.stride(0), "out_d": out.stride(1),
        "logits_s": logits.stride(0), "logits_d": logits.stride(1),
        "num_columns": v,
        "first_class": first_class,
        "scale": scale,
    }  # fmt: skip
    launch(gradient_kernel, _TILES, "columns", v, n, logits.device, args)
