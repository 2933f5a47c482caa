"""Activations of MLPs, and gradients that keep nothing but the inputs.

GELU (arXiv:1606.08415) is its tanh approximation, the squared ReLU is of arXiv:2109.08668, SwiGLU
of arXiv:2002.05202. All work element by element, on any device; results have the input's dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gelu_fwd(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, where g is that of gelu_fwd(x)."""
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh").to(x.dtype)


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """gelu_fwd(y + bias). y: (..., n). bias: (n,)."""
    return gelu_fwd(y + bias).to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and bias, where g is that of bias_gelu(y, bias)."""
    grad = gelu_bwd(g, y + bias)
    return grad.to(y.dtype), grad.sum(dim=tuple(range(grad.dim() - 1)), dtype=bias.dtype)


class GeLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, bias)
        return bias_gelu(input, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return bias_gelu_back(grad_output, *ctx.saved_tensors)


bias_gelu_impl = GeLUFunction.apply


class FastGeLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return gelu_fwd(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return gelu_bwd(grad_output, *ctx.saved_tensors)


fast_gelu_impl = FastGeLUFunction.apply


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, where g is that of relu(x)."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x) ** 2."""
    return F.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, where g is that of sqrelu_fwd(x)."""
    return (2.0 * g * F.relu(x)).to(x.dtype)


# For CUDA tensors, one kernel each, which torch compiles when it is first called. In float, or in
# double where the elements are.
_SWIGLU_FWD = """
template <typename T> T swiglu_fwd(T x, T y) {
  if (sizeof(T) == 8) return T(double(x) * double(y) / (1.0 + ::exp(-double(x))));
  return T(float(x) * float(y) / (1.0f + ::exp(-float(x))));
}
"""
_SWIGLU_BWD = """
template <typename T> void swiglu_bwd(T x, T y, T g, T& dx, T& dy) {
  if (sizeof(T) == 8) {
    const double gate = 1.0 / (1.0 + ::exp(-double(x)));
    dx = T(gate * (1.0 + double(x) * (1.0 - gate)) * double(g) * double(y));
    dy = T(double(x) * gate * double(g));
    return;
  }
  const float gate = 1.0f / (1.0f + ::exp(-float(x)));
  dx = T(gate * (1.0f + float(x) * (1.0f - gate)) * float(g) * float(y));
  dy = T(float(x) * gate * float(g));
}
"""


@cache
def _on_cuda(code: str, results: int) -> Callable[..., Any]:
    from torch.cuda import jiterator

    if results == 1:
        return jiterator._create_jit_fn(code)  # type: ignore[no-any-return]
    return jiterator._create_multi_output_jit_fn(  # type: ignore[no-any-return]
        code, num_outputs=results
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y."""
    if x.is_cuda:
        return _on_cuda(_SWIGLU_FWD, 1)(x, y)  # type: ignore[no-any-return]
    return (F.silu(_wide(x)) * _wide(y)).to(x.dtype)


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and y, where g is that of swiglu_fwd(x, y)."""
    if x.is_cuda:
        dx, dy = _on_cuda(_SWIGLU_BWD, 2)(x, y, g)
        return dx, dy
    x_, y_, g_ = map(_wide, (x, y, g))
    gate = torch.sigmoid(x_)
    return (gate * (1 + x_ * (1 - gate)) * g_ * y_).to(x.dtype), (x_ * gate * g_).to(y.dtype)


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return swiglu_fwd(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        return swiglu_bwd(x, y, dout)


swiglu = SwiGLUFunction.apply
