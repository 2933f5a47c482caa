"""The autograd rule of FlashAttention-3's functions, over the `flash_attn_3::` operators."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_attn import _arguments, _attention, _ops_fa3


def split(packed: tuple[Tensor, ...], num_heads_q: Optional[int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of (q, k, v), or of (qkv,): (b, s, 3, h, d), or (b, s, hq + 2 hk, d) if
    `num_heads_q` is given.
    """
    if num_heads_q is None:
        return _attention.split(packed)
    (qkv,) = packed
    num_heads_k = (qkv.shape[-2] - num_heads_q) // 2
    q, k, v = qkv.split([num_heads_q, num_heads_k, num_heads_k], dim=-2)
    return q, k, v


class AttentionFA3(torch.autograd.Function):
    """out, softmax_lse = attention of (qkv) or (q, k, v); gradients flow through out alone."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Optional[Tensor],
        c: Optional[Tensor],
        num_heads_q: Optional[int],
        cu_seqlens_q: Optional[Tensor],
        cu_seqlens_k: Optional[Tensor],
        seqused_q: Optional[Tensor],
        seqused_k: Optional[Tensor],
        max_seqlen_q: Optional[int],
        max_seqlen_k: Optional[int],
        qv: Optional[Tensor],
        q_descale: Optional[Tensor],
        k_descale: Optional[Tensor],
        v_descale: Optional[Tensor],
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        attention_chunk: int,
        softcap: float,
        num_splits: int,
        pack_gqa: Optional[bool],
        deterministic: bool,
        sm_margin: int,
    ) -> tuple[Tensor, Tensor]:
        packed = tuple(x for x in (a, b, c) if x is not None)
        q, k, v = split(packed, num_heads_q)
        out, lse, _, _ = torch.ops.flash_attn_3._flash_attn_forward(
            q,
            k,
            v,
            qv=qv,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size_left=window_size_left,
            window_size_right=window_size_right,
            attention_chunk=attention_chunk,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            sm_margin=sm_margin,
        )
        ctx.save_for_backward(a, b, c, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        ctx.num_heads_q, ctx.max_seqlens = num_heads_q, (max_seqlen_q, max_seqlen_k)
        ctx.tail = (
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            deterministic,
            sm_margin,
        )
        ctx.without_backward = (
            "attention_chunk" if attention_chunk else "qv" if qv is not None else ""
        )
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Optional[Tensor], *ignored: Any) -> tuple[Optional[Tensor], ...]:
        num_inputs = len(ctx.needs_input_grad)
        if dout is None:
            return (None,) * num_inputs
        if ctx.without_backward:
            _arguments.fail(
                "flash_attn_interface",
                f"FA3 backward does not support {ctx.without_backward}",
                f"a forward call with {ctx.without_backward}",
            )
        a, b, c, out, lse, *lengths = ctx.saved_tensors
        packed = tuple(x for x in (a, b, c) if x is not None)
        grads = tuple(torch.empty_like(x) for x in packed)
        torch.ops.flash_attn_3._flash_attn_backward(
            dout,
            *split(packed, ctx.num_heads_q),
            out,
            lse,
            *lengths,
            *ctx.max_seqlens,
            *split(grads, ctx.num_heads_q),
            *ctx.tail,
        )
        return grads + (None,) * (num_inputs - len(grads))


def attend(
    name: str,
    packed: tuple[Tensor, ...],
    options: tuple[Any, ...],
    num_heads_q: Optional[int] = None,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of public function `name`; `options` follow `num_heads_q` in the order of
    `AttentionFA3.forward`.
    """
    inputs = _attention.distinct(packed) + (None,) * (3 - len(packed))
    options = (*_attention.distinct(options[:4]), *options[4:])
    try:
        result: tuple[Tensor, Tensor] = AttentionFA3.apply(*inputs, num_heads_q, *options)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise _arguments.renamed(error, _ops_fa3.FORWARD, name) from error.__cause__
    return result
