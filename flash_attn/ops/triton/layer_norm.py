"""Layer norm (arXiv:1607.06450) and RMS norm (arXiv:1910.07467) behind dropout and a residual."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flash_attn.backends import triton

Result = Union[Tensor, tuple[Optional[Tensor], ...]]


def layer_norm_fn(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor] = None,
    x1: Optional[Tensor] = None,
    weight1: Optional[Tensor] = None,
    bias1: Optional[Tensor] = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Optional[Tensor] = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: Optional[torch.dtype] = None,
    out: Optional[Tensor] = None,
    residual_out: Optional[Tensor] = None,
) -> Result:
    """norm(z) * weight + bias, of z = dropout(x * rowscale) + dropout(x1) + residual.

    x, residual, x1: (..., n). weight, bias: (n,). weight1, bias1: of a second result, of the same
    z. rowscale: (...), without n. zero_centered_weight: weights count from 1. out_dtype: of the
    results, None is x's. out, residual_out: written with the result and z, and returned.

    Returns:
        y, or a tuple: y, y1 with `weight1`, z with `prenorm`, and with `return_dropout_mask` the
        entries kept of x and of x1, or None. z has the residual's dtype, without one float32 if
        `residual_in_fp32`, else x's.
    """
    _check(x, weight, bias, residual, x1, weight1, bias1, rowscale)
    n = x.shape[-1]
    z_dtype = residual.dtype if residual is not None else x.dtype
    if residual is None and residual_in_fp32:
        z_dtype = torch.float32
    y_dtype = x.dtype if out_dtype is None else out_dtype
    term, kept = _dropped(x, dropout_p, rowscale)
    kept1 = None
    if x1 is not None:
        term1, kept1 = _dropped(x1, dropout_p, None)
        term = term.to(_wide(x)) + term1
    rest = None if residual is None else residual.reshape(-1, n)
    shift = 1.0 if zero_centered_weight else 0.0
    rows = term.reshape(-1, n)
    needs_z = prenorm or weight1 is not None or residual_out is not None
    # A second norm reads what the first one did, so z is not rounded before it.
    kept_dtype = None if not needs_z else z_dtype if weight1 is None else _wide(x)
    y, z = _norm(rows, rest, kept_dtype, y_dtype, weight, bias, shift, eps, is_rms_norm)
    y = _into(out, y.view(x.shape))
    results: list[Optional[Tensor]] = [y]
    if weight1 is not None:
        y1, _ = _norm(z, None, None, y_dtype, weight1, bias1, shift, eps, is_rms_norm)
        results.append(y1.view(x.shape))
    if needs_z:
        z = _into(residual_out, z.to(z_dtype).view(x.shape))
    if prenorm:
        results.append(z)
    if return_dropout_mask:
        results += [kept, kept1]
    return tuple(results) if len(results) > 1 else y


def rms_norm_fn(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor] = None,
    x1: Optional[Tensor] = None,
    weight1: Optional[Tensor] = None,
    bias1: Optional[Tensor] = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Optional[Tensor] = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: Optional[torch.dtype] = None,
    out: Optional[Tensor] = None,
    residual_out: Optional[Tensor] = None,
) -> Result:
    """`layer_norm_fn` that divides by the root of the mean square and subtracts no mean."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


class RMSNorm(nn.Module):
    """RMS norm with a weight; dropout and a residual may come before it."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Optional[Union[torch.device, str]] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dropout_p = dropout_p
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Optional[Tensor] = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Result:
        """y, or (y, z) with `prenorm`."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


class _Norm(torch.autograd.Function):
    """(y, z) of rows by the Triton kernels; z is empty unless asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Optional[Tensor],
        z_dtype: Optional[torch.dtype],
        y_dtype: torch.dtype,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        shift: float,
        eps: float,
        is_rms: bool,
    ) -> tuple[Tensor, Optional[Tensor]]:
        from flash_attn._triton.layer_norm import norm

        ctx.returns_z = z_dtype is not None
        if z_dtype is None and residual is not None:
            z_dtype = residual.dtype  # for the backward pass
        y, z, mean, rstd = norm(x, residual, z_dtype, y_dtype, weight, bias, shift, eps, is_rms)
        ctx.save_for_backward(x if z is None else z, mean, rstd, weight)
        ctx.shift, ctx.dtypes = shift, (x.dtype, None if residual is None else residual.dtype)
        ctx.dtype_bias = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y, z if ctx.returns_z else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Optional[Tensor], dz: Optional[Tensor]) -> tuple[Any, ...]:
        from flash_attn._triton.layer_norm import gradients

        z, mean, rstd, weight = ctx.saved_tensors
        of_x, of_residual = ctx.dtypes
        dy = torch.zeros_like(z) if dy is None else _rows(dy)
        dx, dweight, dbias = gradients(
            dy,
            None if dz is None else _rows(dz),
            z,
            mean,
            rstd,
            weight,
            ctx.dtype_bias is not None,
            ctx.shift,
            of_x if of_residual is None else of_residual,
        )
        dresidual = None if of_residual is None else dx
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        if dbias is not None:
            dbias = dbias.to(ctx.dtype_bias)
        return dx.to(of_x), dresidual, None, None, dweight, dbias, None, None, None


def _rows(x: Tensor) -> Tensor:
    """x with a dense last axis, as kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _norm(
    x: Tensor,
    residual: Optional[Tensor],
    z_dtype: Optional[torch.dtype],
    y_dtype: torch.dtype,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    shift: float,
    eps: float,
    is_rms: bool,
) -> tuple[Tensor, Any]:
    """(y, z) of rows (m, n): y = norm(z) * (weight + shift) + bias, z = x + residual."""
    if triton.serves(x) and x.shape[1] > 0:
        from flash_attn._triton.layer_norm import MAX_WIDTH

        if x.shape[1] <= MAX_WIDTH:
            rest = None if residual is None else _rows(residual)
            affine = (None if p is None else p.contiguous() for p in (weight, bias))
            return _Norm.apply(_rows(x), rest, z_dtype, y_dtype, *affine, shift, eps, is_rms)
    wide = z = x.to(_wide(x))
    if residual is not None:
        wide = z = z + residual
    if not is_rms:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + shift)
    if bias is not None:
        y = y + bias
    return y.to(y_dtype), None if z_dtype is None else z.to(z_dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _dropped(
    x: Tensor, dropout_p: float, rowscale: Optional[Tensor]
) -> tuple[Tensor, Optional[Tensor]]:
    """x * rowscale after dropout, and which entries were kept."""
    if rowscale is not None:
        x = x.to(_wide(x)) * rowscale.unsqueeze(-1)
    if dropout_p == 0.0:
        return x, None
    kept = torch.rand(x.shape, device=x.device) >= dropout_p
    return torch.where(kept, x.to(_wide(x)) / (1.0 - dropout_p), 0.0), kept


def _into(out: Optional[Tensor], x: Tensor) -> Tensor:
    return x if out is None else out.copy_(x)


def _check(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    x1: Optional[Tensor],
    weight1: Optional[Tensor],
    bias1: Optional[Tensor],
    rowscale: Optional[Tensor],
) -> None:
    affine = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    rules = [(name, value, x.shape[-1:]) for name, value in affine.items()]
    rules += [("residual", residual, x.shape), ("x1", x1, x.shape)]
    rules += [("rowscale", rowscale, x.shape[:-1])]
    for argument, value, shape in rules:
        if value is not None and value.shape != shape:
            raise ValueError(
                f"layer_norm_fn: {argument} has shape {tuple(value.shape)}; beside x of shape "
                f"{tuple(x.shape)} it must be {tuple(shape)}"
            )
