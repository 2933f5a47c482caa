"""Rotary position embeddings (RoFormer, arXiv:2104.09864), also scaled (XPos, arXiv:2212.10554).

The functions ending in `_` work in place, as published. Use what they return: of a leaf that
requires grad, or a view by unbind or split, it alone has the gradient. Shapes: x (b, s, h, d), or
(total, h, d) with cu_seqlens; cos, sin (seqlen_ro, rotary_dim / 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _autograd

from flash_attn._rotary import check_rotary_dim
from flash_attn.ops.triton.rotary import apply_rotary, check_call, check_padded


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Turn every feature pair (a, b) by a right angle, into (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The textbook form in x's own precision, differentiable in x, cos and sin; for comparison.

    x: (b, s, h, d). cos, sin: (s, rotary_dim / 2) or (b, s, rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    check_rotary_dim("apply_rotary_emb_torch", rotary_dim, x.shape[-1])

    def per_feature(table: Tensor) -> Tensor:
        if interleaved:
            return table.repeat_interleave(2, dim=-1).unsqueeze(-2)
        return torch.cat((table, table), dim=-1).unsqueeze(-2)

    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turning * per_feature(cos) + rotate_half(turning, interleaved) * per_feature(sin)
    return torch.cat((turned, rest), dim=-1)


class ApplyRotaryEmb(torch.autograd.Function):
    """`apply_rotary`, whose gradient is the rotation the other way; saves the tables, never x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        offsets: int | Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        interleaved: bool,
        conjugate: bool,
    ) -> Tensor:
        has_offsets = isinstance(offsets, Tensor)
        ctx.save_for_backward(cos, sin, offsets if has_offsets else None, cu_seqlens)
        ctx.offset, ctx.max_seqlen = None if has_offsets else offsets, max_seqlen
        ctx.interleaved, ctx.conjugate = interleaved, conjugate
        where = (offsets, cu_seqlens, max_seqlen)
        return apply_rotary(x, cos, sin, *where, interleaved, conjugate=conjugate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, offsets, cu_seqlens = ctx.saved_tensors
        where = (ctx.offset if offsets is None else offsets, cu_seqlens, ctx.max_seqlen)
        turned_back = ApplyRotaryEmb.apply(
            grad, cos, sin, *where, ctx.interleaved, not ctx.conjugate
        )
        return turned_back, None, None, None, None, None, None, None


def _turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    inplace: bool,
    offsets: int | Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    where = (offsets, cu_seqlens, max_seqlen)
    if inplace and not (torch.is_grad_enabled() and x.requires_grad):
        return apply_rotary(x, cos, sin, *where, interleaved, inplace=True)
    turned = ApplyRotaryEmb.apply(x, cos, sin, *where, interleaved, False)
    return x.copy_(turned) if inplace else turned


def _refuses_writes(x: Tensor) -> bool:
    """Whether autograd lets nobody write to x: a leaf, a view of one, or one of several views that
    a function returned (unbind, split).
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return False
    if x.is_leaf or x._base is None:
        return x.is_leaf
    default = _autograd.CreationMeta.DEFAULT
    return x._base.is_leaf or bool(_autograd._get_creation_meta(x) != default)


def _write(x: Tensor, turn: Callable[[Tensor], Any]) -> Tensor:
    """x after `turn` in place. Where autograd refuses that, x gets the values alone, and a tensor
    beside it, which is returned, the gradient.
    """
    turned = x.clone() if _refuses_writes(x) else x
    turn(turned)
    if turned is not x:
        x.detach().copy_(turned.detach())
    return turned


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first `rotary_dim <= d` features of every head by the token's position.

    x: (b, s, h, d), or (total, h, d) with cu_seqlens (b + 1,) and max_seqlen. cos, sin:
    (seqlen_ro, rotary_dim / 2). interleaved: pairs (0, 1), (2, 3), ... (GPT-J) instead of halves
    (GPT-NeoX). seqlen_offsets: int or int tensor (b,), where each sequence starts. inplace: write
    into x and return it. The maths is in float32 or wider, the result has x's dtype; differentiable
    in x. Raises ValueError or TypeError for shapes, lengths or dtypes that do not fit.
    """
    check_call("apply_rotary_emb", x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    where = (seqlen_offsets, cu_seqlens, max_seqlen)
    if not inplace:
        return _turn(x, cos, sin, interleaved, False, *where)
    return _write(x, lambda x: _turn(x, cos, sin, interleaved, True, *where))


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate Q and K of packed QKV in place, and return it.

    qkv: (b, s, 3, h, d), or (b, s, hq + 2 * hk, d) with num_heads_q = hq. cos_k, sin_k: other
    tables for K (XPos). The rest is as in `apply_rotary_emb`.
    """
    function = "apply_rotary_emb_qkv_"
    check_padded(function, qkv, cos, sin, seqlen_offsets)
    heads: tuple[Any, Any]
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        heads = 0, 1
    elif (
        qkv.dim() == 4
        and num_heads_q is not None
        and 0 < num_heads_q <= qkv.shape[2]
        and (qkv.shape[2] - num_heads_q) % 2 == 0
    ):
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        heads = slice(num_heads_q), slice(num_heads_q, num_heads_q + num_heads_k)
    else:
        raise ValueError(
            f"{function}: qkv has shape {tuple(qkv.shape)}, num_heads_q is {num_heads_q}; it must "
            "be (b, s, 3, h, d), or (b, s, hq + 2 * hk, d) with num_heads_q = hq"
        )
    if cos_k is None or sin_k is None:
        cos_k, sin_k = cos, sin
    check_padded(function, qkv, cos_k, sin_k, seqlen_offsets)

    def turn(qkv: Tensor) -> None:
        _turn(qkv[:, :, heads[0]], cos, sin, interleaved, True, seqlen_offsets)
        _turn(qkv[:, :, heads[1]], cos_k, sin_k, interleaved, True, seqlen_offsets)

    return _write(qkv, turn)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate K of packed KV (b, s, 2, hk, d) in place, and return it; as `apply_rotary_emb`."""
    function = "apply_rotary_emb_kv_"
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"{function}: kv has shape {tuple(kv.shape)}; it must be (b, s, 2, hk, d)")
    check_padded(function, kv, cos, sin, seqlen_offsets)
    return _write(kv, lambda kv: _turn(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets))


class RotaryEmbedding(nn.Module):
    """Rotary tables that grow on demand, and their application to Q and K in place.

    dim: rotary dimension, even, at most the head dim. base: frequency m is base^(-2m / dim).
    scale_base: None, or XPos's scale base (the paper has 512): Q is scaled up and K down with
    position, so that scores decay with distance. The scale is 1 in the middle of the tables, which
    moves when they grow: with a KV cache give `forward` its max_seqlen from the first call on.
    inv_freq and the tables are made in float32 whatever the module's dtype is, because bf16 cannot
    tell neighbouring positions apart.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}; it must be even and positive")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device, dtype=torch.float32) + 0.4 * dim) / (
                1.4 * dim
            )
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / (self.base**exponents)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the tables hold at least `seqlen` positions, on `device`, in `dtype`."""
        device = self.inv_freq.device if device is None else torch.device(device)
        dtype = self.inv_freq.dtype if dtype is None else dtype
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            # Tables made under inference_mode cannot be saved for a backward pass. torch.compile
            # cannot trace the question.
            and not (self.training and not torch.compiler.is_compiling() and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        # `module.to(bfloat16)` casts buffers too; such an inv_freq has lost its precision.
        exact = self.inv_freq.dtype == torch.float32
        inv_freq = self.inv_freq if exact else self._compute_inv_freq(device)
        angles = torch.outer(positions, inv_freq.to(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=device, dtype=torch.float32) ** power.unsqueeze(-1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cos and sin for Q, then for K."""
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError(
                "RotaryEmbedding: seqlen_offset is a tensor and max_seqlen is None; the first call "
                "with a tensor offset must give max_seqlen"
            )
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        return cos, sin, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate in place: packed qkv, returned; or q and packed kv, returned as a pair.

        qkv: (b, s, 3, h, d), or (b, s, hq + 2 * hk, d) with num_heads_q; with kv it is q,
        (b, s, hq, d), and kv is (b, s, 2, hk, d). seqlen_offset: int or int tensor (b,), the tokens
        already in a KV cache. max_seqlen: the positions to make tables for; required once with a
        tensor offset, whose values are not read.
        """
        if max_seqlen is None and not isinstance(seqlen_offset, Tensor):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = self._tables()
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv,
                cos,
                sin,
                self._cos_k_cached,
                self._sin_k_cached,
                interleaved=self.interleaved,
                seqlen_offsets=seqlen_offset,
                num_heads_q=num_heads_q,
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)

    def rotate_varlen_(
        self, q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Rotate packed sequences q (total, hq, d), k (total, hk, d) in place; return the pair."""
        self._update_cos_sin_cache(max_seqlen, device=q.device, dtype=q.dtype)
        cos, sin, cos_k, sin_k = self._tables()
        where: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        q = apply_rotary_emb(q, cos, sin, self.interleaved, inplace=True, **where)
        return q, apply_rotary_emb(k, cos_k, sin_k, self.interleaved, inplace=True, **where)
