"""The autograd rule of FlashAttention-3's functions, over the `flash_attn_3::` operators."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd.function import once_differentiable

from flash_attn import _arguments, _attention, _ops_fa3
from flash_attn._attention import distinct, is_differentiated, is_watched, present
from flash_attn.backends import cuda

_OPS = torch.ops.flash_attn_3


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


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """out, softmax_lse. By position and by overload: names, and a packet of overloads, are slow."""
    out, lse, _, _ = _OPS._flash_attn_forward.default(
        q,
        k,
        v,
        None,  # k_new
        None,  # v_new
        qv,
        None,  # out_
        cu_seqlens_q,
        cu_seqlens_k,
        None,  # cu_seqlens_k_new
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        None,  # page_table
        None,  # kv_batch_idx
        None,  # leftpad_k
        None,  # rotary_cos
        None,  # rotary_sin
        None,  # seqlens_rotary
        q_descale,
        k_descale,
        v_descale,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        attention_chunk,
        softcap,
        True,  # rotary_interleaved
        None,  # scheduler_metadata
        num_splits,
        pack_gqa,
        sm_margin,
    )
    return out, lse


class AttentionFA3(torch.autograd.Function):
    """out, softmax_lse = attention of (qkv) or (q, k, v); gradients flow through out alone.

    `options` are those of `_forward`, in its order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Optional[Tensor],
        c: Optional[Tensor],
        num_heads_q: Optional[int],
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(*split(present(a, b, c), num_heads_q), *options)
        (*lengths, max_seqlen_q, max_seqlen_k, qv, _, _, _) = options[:10]
        scale, causal, left, right, chunk, softcap, _, _, deterministic, sm_margin = options[10:]
        ctx.save_for_backward(a, b, c, out, lse, *lengths)
        ctx.num_heads_q, ctx.max_seqlens = num_heads_q, (max_seqlen_q, max_seqlen_k)
        ctx.tail = (scale, causal, left, right, softcap, deterministic, sm_margin)
        ctx.without_backward = "attention_chunk" if chunk else "qv" if qv is not None else ""
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
        packed = present(a, b, c)
        grads = tuple(torch.empty_like(x) for x in packed)
        _OPS._flash_attn_backward.default(
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


# As `_attention` calls its rule.
_bare_apply = super(torch.autograd.Function, AttentionFA3).apply


def attend(
    name: str,
    packed: tuple[Tensor, ...],
    options: tuple[Any, ...],
    num_heads_q: Optional[int] = None,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of public function `name`; `options` are those of `_forward`, in its
    order.
    """
    others = (None,) * (3 - len(packed))
    qv = options[6]
    try:
        inputs = packed if qv is None else (*packed, qv)
        if not is_differentiated(inputs, torch.is_grad_enabled()):
            return _forward(*split(packed, num_heads_q), *options)
        if is_watched(packed):
            lengths, rest = options[:4], options[4:]
            return AttentionFA3.apply(  # type: ignore[no-any-return]
                *distinct(packed), *others, num_heads_q, *distinct(lengths), *rest
            )
        alive = map(unwrap_if_dead, packed)
        return _bare_apply(*alive, *others, num_heads_q, *options)  # type: ignore[no-any-return]
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        if cuda.gives_way(packed[0].device):
            return attend(name, packed, options, num_heads_q)
        raise _arguments.renamed(error, _ops_fa3.FORWARD, name) from error.__cause__
