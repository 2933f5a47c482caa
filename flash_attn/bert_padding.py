"""Between padded batches and packed sequences: `unpad_input`, `pad_input` and what they stand on.

A padded batch is (b, s, ...) with a mask; packed sequences are (total, ...) with `cu_seqlens`, the
running sums of the lengths, which the varlen functions take.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "repeat",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def _check_indices(function: str, indices: Tensor) -> None:
    if indices.dim() != 1:
        raise ValueError(
            f"{function}: indices has shape {tuple(indices.shape)}; it must be (total,)"
        )


def _scatter_rows(rows: Tensor, indices: Tensor, size: int) -> Tensor:
    """Row i of `rows` added at `indices[i]` of a zero tensor with `size` rows."""
    return rows.new_zeros((size, *rows.shape[1:])).index_add(0, indices.to(torch.int64), rows)


class IndexFirstAxis(torch.autograd.Function):
    """`x[indices]` for x (n, ...) and integer indices (total,), repeats allowed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> Tensor:
        _check_indices("index_first_axis", indices)
        ctx.save_for_backward(indices)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (indices,) = ctx.saved_tensors
        return _scatter_rows(grad, indices, ctx.num_rows), None


class IndexPutFirstAxis(torch.autograd.Function):
    """A zero tensor (first_axis_dim, ...) whose rows `indices` are `values`; no index twice."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        _check_indices("index_put_first_axis", indices)
        ctx.save_for_backward(indices)
        return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(
            0, indices.to(torch.int64), values
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (indices,) = ctx.saved_tensors
        return grad.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """`(x[indices], x)`, for a layer that changes the chosen rows and adds them back to all rows.

    One node for both outputs, so their gradients meet in one buffer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        _check_indices("index_first_axis_residual", indices)
        ctx.save_for_backward(indices)
        return x.index_select(0, indices), x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices.to(torch.int64), grad), None


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def _cu_seqlens(seqlens: Tensor) -> tuple[Tensor, int]:
    """Running sums (b + 1,) int32 from 0, and the longest length as an int (one device sync)."""
    cu_seqlens = F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(seqlens.max().item()) if seqlens.numel() else 0


def _true_indices(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero(as_tuple=False).flatten()


def _check_mask(function: str, name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{function}: {name} has shape {tuple(mask.shape)}, hidden_states "
            f"{tuple(hidden_states.shape)}; {name} must be the first two dimensions (b, s) of it"
        )


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Take the tokens of a padded batch that its masks select.

    hidden_states: (b, s, ...). attention_mask: (b, s), bool or number, non-zero = a real token.
    unused_mask: (b, s), non-zero = a token that gets a place but takes no part in attention (a
    reserved slot); such tokens must follow the real ones of their sequence for `seqused` to
    describe them.

    Returns `(packed, indices, cu_seqlens, max_seqlen, seqused)`: packed (total, ...); indices int64
    (total,) into the flattened (b * s); cu_seqlens int32 (b + 1,); max_seqlen an int; seqused int32
    (b,), the real tokens of each sequence. Raises ValueError for masks of another shape.
    """
    _check_mask("unpad_input", "attention_mask", attention_mask, hidden_states)
    used = attention_mask != 0
    kept = used
    if unused_mask is not None:
        _check_mask("unpad_input", "unused_mask", unused_mask, hidden_states)
        kept = used | (unused_mask != 0)
    cu_seqlens, max_seqlen = _cu_seqlens(kept.sum(dim=-1, dtype=torch.int32))
    indices = _true_indices(kept)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, max_seqlen, used.sum(dim=-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `unpad_input`, for rows that hold several short sequences one behind the other.

    attention_mask_in_length: int (b, s). The non-zero entries of a row are the lengths of its
    sequences in order: `[2, 4, 0, 0, 0, 0]` is a sequence of 2 tokens, then one of 4. A sequence
    never attends to its row neighbour, because each has its own entry in cu_seqlens.

    Returns `(packed, indices, cu_seqlens, max_seqlen)`; cu_seqlens has one entry more than there
    are sequences. Raises ValueError for a mask of another shape.
    """
    function = "unpad_input_for_concatenated_sequences"
    _check_mask(function, "attention_mask_in_length", attention_mask_in_length, hidden_states)
    columns = torch.arange(hidden_states.shape[1], device=attention_mask_in_length.device)
    kept = columns < attention_mask_in_length.sum(dim=-1, keepdim=True)
    lengths = attention_mask_in_length.flatten()
    cu_seqlens, max_seqlen = _cu_seqlens(lengths[lengths != 0])
    indices = _true_indices(kept)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, max_seqlen


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: packed (total, ...) to padded (batch, seqlen, ...), zeros elsewhere."""
    try:
        padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    except IndexError as error:
        raise ValueError(
            f"pad_input: indices must be {hidden_states.shape[0]} rows of the {batch} * {seqlen} "
            f"that the padded batch has; {error}"
        ) from None
    return padded.unflatten(0, (batch, seqlen))
