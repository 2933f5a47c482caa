"""The MLPs of transformer blocks: plain, and gated (arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any, Callable, Optional, Union

import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.ops.activations import swiglu

# Published where its extension of fused products is installed, else None.
FusedMLP = ParallelFusedMLP = None

Result = Union[Tensor, tuple[Tensor, Tensor]]


class Mlp(nn.Module):
    """fc2(activation(fc1(x))).

    Args:
        hidden_features: None is 4 in_features.
        out_features: None is in_features.
        bias1, bias2: of fc1 and of fc2.
        return_residual: the result is a pair, with x behind it.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Result:
        """x: (..., in_features)."""
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class GatedMlp(nn.Module):
    """fc2(y * activation(gate)), where (y, gate) = fc1(x).

    Args:
        hidden_features: None is 8 / 3 of in_features; rounded up to a multiple of `multiple_of`.
        out_features: None is in_features.
        activation: `F.sigmoid` is GLU, `F.silu` SwiGLU.
        bias1, bias2: of fc1 and of fc2.
        return_residual: the result is a pair, with x behind it.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Callable[[Tensor], Tensor] = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden = 8 * in_features // 3 if hidden_features is None else hidden_features
        hidden = (hidden + multiple_of - 1) // multiple_of * multiple_of
        out = in_features if out_features is None else out_features
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias1, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Result:
        """x: (..., in_features)."""
        both = self.fc1(x)
        y, gate = both.chunk(2, dim=-1)
        if self.activation is F.sigmoid:
            hidden = F.glu(both, dim=-1)
        elif self.activation is F.silu:
            hidden = swiglu(gate, y)
        else:
            hidden = y * self.activation(gate)
        result = self.fc2(hidden)
        return (result, x) if self.return_residual else result
