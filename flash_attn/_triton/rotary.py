"""The rotation of rotary position embeddings (RoFormer, arXiv:2104.09864), as `_rotary` has it."""

from __future__ import annotations

from typing import Optional, Union

import triton.language as tl
from torch import Tensor

from flash_attn._triton.launch import Config, launch, padded, strides
from flash_attn._triton.numbers import kernel, narrow, wide
from flash_attn._triton.sequences import span

_TILES = (Config(32, 16, 2, 1),)  # measured: docs/kernels/triton.md


@kernel
def rotary_kernel(
    out, x, cos, sin,
    out_b, out_s, out_h, out_d, x_b, x_s, x_h, x_d, cos_s, cos_d, sin_s, sin_d,
    cu_seqlens, room, offsets, offset, step, rows_of_table, h, num_blocks,
    IS_INTERLEAVED: tl.constexpr, IS_CONJUGATE: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first 2 HALF features of x, turned. Grid: blocks of rows x h x b, the first fastest.

    Row i of sequence b stands at position offset + offsets[b] + i * step; one behind the table is
    turned as the table's last.
    """
    block, rest = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    head, b = rest % h, rest // h
    start, rows = span(cu_seqlens, None, room, b)
    row = block * ROWS
    if row >= rows:
        return
    i = row + tl.arange(0, ROWS)
    position = wide(offset + i * step)
    if offsets is not None:
        position += tl.load(offsets + b)
    position = tl.minimum(tl.maximum(position, 0), rows_of_table - 1)[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    is_there = (i < rows)[:, None] & (pair < HALF)
    c = tl.load(cos + position * cos_s + pair * cos_d, mask=is_there, other=1.0).to(tl.float32)
    s = tl.load(sin + position * sin_s + pair * sin_d, mask=is_there, other=0.0).to(tl.float32)
    if IS_CONJUGATE:
        s = -s
    at = wide(start + i)[:, None]
    x += wide(b) * x_b + wide(head) * x_h + at * x_s
    out += wide(b) * out_b + wide(head) * out_h + at * out_s
    if IS_INTERLEAVED:  # whole rows are read and written, so that neighbours go together
        feature = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        is_feature = (i < rows)[:, None] & (feature < 2 * HALF)
        whole = tl.load(x + feature * x_d, mask=is_feature, other=0.0)
        x_0, x_1 = tl.split(tl.reshape(whole, [ROWS, BLOCK_HALF, 2]))
    else:
        x_0 = tl.load(x + pair * x_d, mask=is_there, other=0.0)
        x_1 = tl.load(x + (pair + HALF) * x_d, mask=is_there, other=0.0)
    x_0, x_1 = x_0.to(tl.float32), x_1.to(tl.float32)
    turned_0 = narrow(x_0 * c - x_1 * s, out.dtype.element_ty)
    turned_1 = narrow(x_0 * s + x_1 * c, out.dtype.element_ty)
    if IS_INTERLEAVED:
        whole = tl.reshape(tl.join(turned_0, turned_1), [ROWS, 2 * BLOCK_HALF])
        tl.store(out + feature * out_d, whole, mask=is_feature)
    else:
        tl.store(out + pair * out_d, turned_0, mask=is_there)
        tl.store(out + (pair + HALF) * out_d, turned_1, mask=is_there)


def rotate_into(
    out: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Union[int, Tensor],
    cu_seqlens: Optional[Tensor] = None,
    max_seqlen: Optional[int] = None,
    *,
    interleaved: bool,
    conjugate: bool = False,
    moves: bool = True,
) -> None:
    """Rotated features of x (b, s, h, d), or (total, h, d) with `cu_seqlens`; the others are not
    written. `out` may be x.

    offsets: position of a sequence's first row, (b,) or an int; without `moves`, of all its rows.
    """
    b = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    longest = x.shape[-3] if max_seqlen is None else min(max_seqlen, x.shape[-3])
    half = cos.shape[-1]
    if half == 0:
        return
    args = {
        "out": out, "x": x, "cos": cos, "sin": sin,
        **strides("out", out), **strides("x", x),
        "cos_s": cos.stride(0), "cos_d": cos.stride(1),
        "sin_s": sin.stride(0), "sin_d": sin.stride(1),
        "cu_seqlens": cu_seqlens,
        "room": x.shape[-3],
        "offsets": offsets if isinstance(offsets, Tensor) else None,
        "offset": 0 if isinstance(offsets, Tensor) else offsets,
        "step": int(moves),
        "rows_of_table": cos.shape[0],
        "h": x.shape[-2],
        "IS_INTERLEAVED": interleaved,
        "IS_CONJUGATE": conjugate,
        "HALF": half,
        "BLOCK_HALF": padded(half),
    }  # fmt: skip
    launch(rotary_kernel, _TILES, "rows", longest, x.shape[-2] * b, x.device, args)
