"""Attention of some inputs by FlashAttention-3, FlashAttention-4, cuDNN and this package."""

from __future__ import annotations

import importlib
import site
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import fa3_operators
import gpu
from accuracy import with_outliers

OURS, FA3, FA4, CUDNN = gpu.OURS, "FlashAttention-3", "FlashAttention-4", "cuDNN"
# So much, in natural logarithms, the scores of 128 keys lie above those of the 128 before them.
RISE = 14.0


@dataclass(frozen=True)
class Case:
    """q, k, v, dout of (batch, seqlen, heads, head_dim); `lengths`: packed sequences instead."""

    kind: str
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int = -1  # keys to the left of a query's own, and none to its right
    dtype: str = "bfloat16"
    lengths: Optional[tuple[int, ...]] = None
    head_dim_v: Optional[int] = None  # where v has another head dim

    @property
    def value_dim(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def window_size(self) -> tuple[int, int]:
        return (self.window, 0) if self.window >= 0 else (-1, -1)

    def flops(self, passes: str) -> float:
        """Useful work: of pairs that no mask hides."""
        pairs = 0.0
        for seqlen in self.lengths or (self.seqlen,) * self.batch:
            if self.window >= 0:
                width = self.window + 1
                pairs += seqlen * width - width * (width - 1) / 2
            else:
                pairs += seqlen**2 * (0.5 if self.causal else 1.0)
        columns = self.head_dim + self.value_dim
        return gpu.FLOPS_OF_PASS[passes] * 2 * self.heads * pairs * columns


class Inputs:
    """Random tensors of a case, of one of KINDS."""

    def __init__(self, case: Case, kind: str = "normal", device: str = "cuda") -> None:
        import torch

        generator = torch.Generator(device).manual_seed(case.seqlen + case.head_dim)
        like: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "device": device}
        rows = (sum(case.lengths),) if case.lengths else (case.batch, case.seqlen)

        def rand(heads: int, head_dim: int) -> Any:
            return torch.randn((*rows, heads, head_dim), generator=generator, **like)

        self.case, self.kind = case, kind
        q, k = (rand(heads, case.head_dim) for heads in (case.heads, case.kv_heads))
        v = rand(case.kv_heads, case.value_dim)
        self.qkv = KINDS[kind](q, k, v, generator)
        for x in self.qkv:
            x.requires_grad_()
        self.dout = rand(case.heads, case.value_dim)
        self.cu_seqlens = None
        if case.lengths:
            ends = torch.tensor((0, *case.lengths), dtype=torch.int32).cumsum(0)
            self.cu_seqlens = ends.to(device=device, dtype=torch.int32)


def normal(q: Any, k: Any, v: Any, generator: Any) -> list[Any]:
    return [q, k, v]


def outliers(q: Any, k: Any, v: Any, generator: Any) -> list[Any]:
    return [with_outliers(x, generator) for x in (q, k, v)]


def huge(q: Any, k: Any, v: Any, generator: Any) -> list[Any]:
    """Scores of hundreds: one key has all of the weight, and sums overflow on the way to it."""
    return [16 * q, 16 * k, v]


def rising(q: Any, k: Any, v: Any, generator: Any) -> list[Any]:
    """Each block of keys has the highest scores so far, on a walk from the first key."""
    import torch

    q[..., 0] = q.shape[-1] ** 0.5
    k[..., 0] = torch.arange(k.shape[1], device=k.device)[:, None] * (RISE / 128)
    return [q, k, v]


def falling(q: Any, k: Any, v: Any, generator: Any) -> list[Any]:
    """The same on a walk from the last key."""
    q, k, v = rising(q, k, v, generator)
    return [q, k.flip(1), v]


# All but the first are what rounding, or shortcuts of online softmax, may not like.
KINDS = {
    "normal": normal,
    "outliers": outliers,
    "huge": huge,
    "rising": rising,
    "falling": falling,
}


class Method(ABC):
    """One way to compute attention, and its gradients, of some inputs."""

    deterministic = False

    @staticmethod
    def takes(case: Case) -> bool:
        return True

    @abstractmethod
    def __init__(self, inputs: Inputs) -> None: ...

    @abstractmethod
    def forward(self) -> Any: ...

    @abstractmethod
    def backward(self) -> Any: ...

    @abstractmethod
    def both(self) -> Any: ...

    def of(self, passes: str) -> Callable[[], Any]:
        return {"fwd": self.forward, "bwd": self.backward, "fwd+bwd": self.both}[passes]

    def results(self) -> list[Any]:
        """out, dq, dk, dv."""
        return [self.forward(), *self.backward()]


class Autograd(Method):
    """A method whose backward is torch's."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.out = self.attend()

    @abstractmethod
    def attend(self) -> Any: ...

    def forward(self) -> Any:
        import torch

        with torch.no_grad():
            return self.attend()

    def backward(self) -> Any:
        import torch

        inputs = self.inputs
        return torch.autograd.grad(self.out, inputs.qkv, inputs.dout, retain_graph=True)

    def both(self) -> Any:
        import torch

        return torch.autograd.grad(self.attend(), self.inputs.qkv, self.inputs.dout)


class FlashAttn(Autograd):
    """The public functions."""

    def attend(self) -> Any:
        import flash_attn

        return self.attend_by(flash_attn)

    def attend_by(self, functions: Any) -> Any:
        """`functions`: what has flash_attn_func and flash_attn_varlen_func."""
        case = self.inputs.case
        rule: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size}
        if self.deterministic:
            rule["deterministic"] = True
        if not case.lengths:
            return functions.flash_attn_func(*self.inputs.qkv, **rule)
        for side in "qk":
            rule[f"cu_seqlens_{side}"] = self.inputs.cu_seqlens
            rule[f"max_seqlen_{side}"] = max(case.lengths)
        return functions.flash_attn_varlen_func(*self.inputs.qkv, **rule)


class FlashAttention4(FlashAttn):
    """The functions of the same names of `flash_attn.cute`, which give the log-sum-exp too."""

    @staticmethod
    def takes(case: Case) -> bool:
        return case.head_dim_v is None  # of others nothing is known

    def attend(self) -> Any:
        return self.attend_by(importlib.import_module("flash_attn.cute"))[0]


class CuDnn(Autograd):
    """torch SDPA with its cuDNN backend."""

    @staticmethod
    def takes(case: Case) -> bool:
        return case.window < 0 and not case.lengths

    def attend(self) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        case = self.inputs.case
        heads_first = [x.transpose(1, 2) for x in self.inputs.qkv]
        groups = case.heads != case.kv_heads
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(
                *heads_first, is_causal=case.causal, enable_gqa=groups
            )
        return out.transpose(1, 2)


class FlashAttention3(Method):
    """The operators of its extension, without autograd."""

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        self.qkv = [x.detach() for x in inputs.qkv]
        self.dout = inputs.dout
        longest = max(case.lengths) if case.lengths else None
        self.rule = (case.causal, case.window_size, inputs.cu_seqlens, longest)
        self.saved = self._forward()

    def _forward(self) -> Any:
        return fa3_operators.forward(*self.qkv, *self.rule)

    def _backward(self, out: Any, lse: Any) -> Any:
        operands = (self.dout, *self.qkv, out, lse)
        return fa3_operators.backward(*operands, *self.rule, deterministic=self.deterministic)

    def forward(self) -> Any:
        return self._forward()[0]

    def backward(self) -> Any:
        return self._backward(*self.saved)

    def both(self) -> Any:
        return self._backward(*self._forward())


Methods = dict[str, type[Method]]


def deterministic(method: type[Method]) -> type[Method]:
    """The same method with sums in one order."""
    return type(method.__name__, (method,), {"deterministic": True})


def load(fa3: Path, fa4: Optional[Path]) -> Methods:
    """Ours, and those of the libraries given."""
    import torch

    torch.ops.load_library(str(fa3))
    methods: Methods = {OURS: FlashAttn, FA3: FlashAttention3}
    if fa4:
        add_cute(fa4)
        methods[FA4] = FlashAttention4
    return {**methods, CUDNN: CuDnn}


def add_cute(folder: Path) -> None:
    """Lets `flash_attn.cute` be imported from a folder, all else of that name being ours."""
    import flash_attn

    site.addsitedir(str(folder))
    flash_attn.__path__.append(str(folder / "flash_attn"))
