"""Cross entropy of rows of logits, with label smoothing and a z-loss (PaLM, arXiv:2204.02311)."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from flash_attn.backends import triton


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(losses, z_losses) of each row, (n,) float32; z_losses are part of losses.

    With x = logit_scale * logits and lse its log-sum-exp, a row's loss is
    lse - (1 - label_smoothing) * x[label] - label_smoothing * mean(x) + lse_square_scale * lse^2,
    whose last term is the z-loss; both are 0 where the label is `ignore_index`.

    logits: (n, v). labels: (n,) int. precomputed_lse: (n,) float32, lse where it is known.
    inplace_backward: write the gradient over `logits`. process_group: each rank has v of the
    classes, in the order of ranks; labels count all of them. z_losses carry no gradient.
    """
    name = "cross_entropy_loss"
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{name}: logits has shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; "
            "they must be (n, v) and (n,)"
        )
    if precomputed_lse is not None and precomputed_lse.shape != labels.shape:
        raise ValueError(
            f"{name}: precomputed_lse has shape {tuple(precomputed_lse.shape)}; "
            f"it must be (n,) = ({labels.shape[0]},)"
        )
    options = (label_smoothing, logit_scale, lse_square_scale, ignore_index)
    losses, z_losses = CrossEntropyLoss.apply(
        logits, labels, precomputed_lse, options, inplace_backward, process_group
    )
    return losses, z_losses


class CrossEntropyLoss(torch.autograd.Function):
    """`cross_entropy_loss`, whose gradient is made of what the forward pass knows of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        lse: Optional[Tensor],
        options: tuple[float, float, float, int],
        inplace_backward: bool,
        process_group: Any,
    ) -> tuple[Tensor, Tensor]:
        smoothing, scale, square_scale, ignore_index = options
        num_classes, first_class = logits.shape[1], 0
        if process_group is not None:
            num_classes *= distributed.get_world_size(process_group)
            first_class = distributed.get_rank(process_group) * logits.shape[1]
        rows = _rows_by_torch
        if triton.serves(logits):
            from flash_attn._triton.cross_entropy import rows
        own_lse, at_label, total = rows(logits, labels, scale, first_class, smoothing > 0)
        if process_group is not None:
            own_lse = _sum_of_exponentials(own_lse, process_group)
            for x in (at_label, total):
                if x is not None:
                    distributed.all_reduce(x, group=process_group)
        lse = own_lse if lse is None else lse
        losses = lse - (1.0 - smoothing) * at_label
        if total is not None:
            losses = losses - smoothing / num_classes * total
        is_ignored = labels == ignore_index
        z_losses = (square_scale * lse.square()).masked_fill(is_ignored, 0.0)
        losses = losses.masked_fill(is_ignored, 0.0) + z_losses
        ctx.save_for_backward(logits, labels, lse)
        ctx.options, ctx.inplace_backward = options, inplace_backward
        ctx.num_classes, ctx.first_class = num_classes, first_class
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor, *ignored: Any) -> tuple[Optional[Tensor], ...]:
        logits, labels, lse = ctx.saved_tensors
        smoothing, scale, square_scale, ignore_index = ctx.options
        by_row = (dlosses.to(lse.dtype) * scale).masked_fill(labels == ignore_index, 0.0)
        factors = (
            by_row * (1.0 + 2.0 * square_scale * lse),
            by_row * (1.0 - smoothing),
            by_row * (smoothing / ctx.num_classes),
        )
        out = logits if ctx.inplace_backward else torch.empty_like(logits)
        gradient = _gradient_by_torch
        if triton.serves(logits):
            from flash_attn._triton.cross_entropy import gradient
        gradient(out, logits, labels, lse, factors, scale, ctx.first_class)
        return out, None, None, None, None, None


def _sum_of_exponentials(lse: Tensor, process_group: Any) -> Tensor:
    """Log-sum-exp over all ranks."""
    parts = [torch.empty_like(lse) for _ in range(distributed.get_world_size(process_group))]
    distributed.all_gather(parts, lse, group=process_group)
    return torch.logsumexp(torch.stack(parts), dim=0)


def _own(labels: Tensor, num_columns: int, first_class: int) -> tuple[Tensor, Tensor]:
    """Columns of the labels, and which of them are here."""
    columns = labels.to(torch.int64) - first_class
    is_here = (columns >= 0) & (columns < num_columns)
    return columns.masked_fill(~is_here, 0)[:, None], is_here


def _rows_by_torch(
    logits: Tensor, labels: Tensor, scale: float, first_class: int, needs_total: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """(lse, at_label, total) of logits (n, v): what `_triton.cross_entropy.rows` gives."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    columns, is_here = _own(labels, logits.shape[1], first_class)
    at_label = torch.gather(x, 1, columns)[:, 0].masked_fill(~is_here, 0.0)
    return torch.logsumexp(x, dim=1), at_label, x.sum(dim=1) if needs_total else None


def _gradient_by_torch(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    first_class: int,
) -> None:
    """d loss / d logits into `out`: what `_triton.cross_entropy.gradient` gives."""
    of_softmax, of_label, of_all = (x[:, None] for x in factors)
    grad = torch.exp(logits.to(lse.dtype) * scale - lse[:, None]).mul_(of_softmax)
    grad = grad.masked_fill(of_softmax == 0.0, 0.0).sub_(of_all)
    columns, is_here = _own(labels, logits.shape[1], first_class)
    grad.scatter_add_(1, columns, -of_label.masked_fill(~is_here[:, None], 0.0))
    out.copy_(grad)
