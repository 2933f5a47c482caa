"""Activations and MLPs: the formulas, their gradients, the published sizes and names."""

from __future__ import annotations

import math
from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from compare import check
from problem_types import BF16, FP16, FP32, FP64
from torch import Tensor

from flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp, ParallelFusedMLP
from flash_attn.ops import activations


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# name: (formula, function, how many inputs)
FORMULAS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "gelu": (gelu, activations.fast_gelu_impl, 1),
    "bias_gelu": (lambda x, bias: gelu(x + bias), activations.bias_gelu_impl, 2),
    "swiglu": (lambda x, y: x / (1 + torch.exp(-x)) * y, activations.swiglu, 2),
}


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    assert out.dtype == inputs[0].dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16])
@pytest.mark.parametrize("name", FORMULAS)
def test_results_and_gradients_follow_the_rule(name: str, dtype: torch.dtype, device: str) -> None:
    formula, function, count = FORMULAS[name]
    shapes = [(33, 20), (20,) if name == "bias_gelu" else (33, 20)][:count]
    inputs = [3 * torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    g = torch.randn(33, 20, dtype=dtype, device=device)
    got = gradients(function, inputs, g)
    low = gradients(formula, inputs, g)
    exact = gradients(formula, [x.double() for x in inputs], g.double())
    for i, (value, reference, yardstick) in enumerate(zip(got, exact, low)):
        check(f"{name} {i}", value, reference, yardstick)


@pytest.mark.parametrize("name", ["relu", "sqrelu"])
def test_gradients_by_hand_are_those_of_autograd(name: str) -> None:
    forward = {"relu": F.relu, "sqrelu": activations.sqrelu_fwd}[name]
    backward = {"relu": activations.relu_bwd, "sqrelu": activations.sqrelu_bwd}[name]
    x = torch.randn(50, dtype=FP64, requires_grad=True)
    g = torch.randn(50, dtype=FP64)
    (expected,) = torch.autograd.grad(forward(x), x, g)
    assert torch.allclose(backward(g, x.detach()), expected)
    assert torch.equal(activations.sqrelu_fwd(x), F.relu(x) * F.relu(x))


def test_a_bias_has_its_gradient_under_more_dimensions() -> None:
    y, bias = torch.randn(2, 3, 5, dtype=FP64), torch.randn(5, dtype=FP64)
    assert torch.autograd.gradcheck(
        activations.bias_gelu_impl, (y.requires_grad_(), bias.requires_grad_())
    )


@pytest.mark.parametrize("activation", [F.sigmoid, F.silu, F.relu], ids=["glu", "swiglu", "reglu"])
def test_a_gated_mlp_is_its_formula(activation: Any) -> None:
    mlp = GatedMlp(24, activation=activation, multiple_of=16, dtype=FP64)
    assert mlp.fc1.weight.shape == (2 * 64, 24)  # 8 / 3 of 24
    x = torch.randn(2, 7, 24, dtype=FP64)
    y, gate = (x @ mlp.fc1.weight.T + mlp.fc1.bias).split(64, dim=-1)
    expected = (y * activation(gate)) @ mlp.fc2.weight.T + mlp.fc2.bias
    assert torch.allclose(mlp(x), expected)
    assert set(mlp.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


def test_a_plain_mlp_is_its_formula() -> None:
    mlp = Mlp(12, out_features=5, bias1=False, bias2=False, return_residual=True, dtype=FP64)
    assert set(mlp.state_dict()) == {"fc1.weight", "fc2.weight"}
    assert mlp.fc1.weight.shape == (48, 12)
    x = torch.randn(3, 12, dtype=FP64)
    out, residual = mlp(x)
    assert residual is x
    assert torch.allclose(out, F.gelu(x @ mlp.fc1.weight.T) @ mlp.fc2.weight.T)


def test_sizes_are_taken_as_given() -> None:
    assert GatedMlp(10, 100, 3).fc2.weight.shape == (3, 128)
    assert Mlp(10, 100, 3).fc2.weight.shape == (3, 100)
    assert FusedMLP is None
    assert ParallelFusedMLP is None
