"""The autograd rule of the public functions: one for every packing, dense or varlen.

Packed inputs are split into views, and packed gradients are written through the same views: no
copies either way.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from flash_attn import _arguments, _ops

Lengths = tuple[Optional[Tensor], Optional[Tensor], Optional[int], Optional[int]]
DENSE: Lengths = (None, None, None, None)


def packed_lengths(
    name: str, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Lengths:
    """What a varlen function says about its sequences."""
    _arguments.check_tensors(name, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k


def split(packed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of (qkv,), (q, kv) or (q, k, v); the packed axis is third from the end."""
    if len(packed) == 3:
        return packed
    *first, rest = packed
    q, k, v = (*first, *rest.unbind(-3))
    return q, k, v


def _forward(
    packed: tuple[Tensor, ...],
    lengths: Lengths,
    rule: tuple[float, float, bool],
    scores: tuple[int, int, float, Optional[Tensor]],
    return_softmax: bool,
    block_table: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, softmax_lse, S_dmask, rng_state of the dense or the varlen op."""
    q, k, v = split(packed)
    if lengths[0] is None:
        return torch.ops.flash_attn._flash_attn_forward(q, k, v, *rule, *scores, return_softmax)
    return torch.ops.flash_attn._flash_attn_varlen_forward(
        q, k, v, *lengths, *rule, *scores, return_softmax, block_table
    )


def distinct(tensors: tuple[Optional[Tensor], ...]) -> tuple[Optional[Tensor], ...]:
    """`tensors`; while compiling, each repetition as a view, because a compiled autograd function
    must not get one tensor twice.
    """
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        x.view_as(x) if x is not None and any(x is y for y in tensors[:i]) else x
        for i, x in enumerate(tensors)
    )


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on. It must meet the autograd function, whose missing
    rule is an error, rather than the operators, which would silently drop the tangent.
    """
    return forward_ad._current_level >= 0


class Attention(torch.autograd.Function):
    """out, softmax_lse, S_dmask = attention of (qkv), (q, kv) or (q, k, v).

    Gradients flow through out alone. `b` and `c` are None where a packing has fewer tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Optional[Tensor],
        c: Optional[Tensor],
        cu_seqlens_q: Optional[Tensor],
        cu_seqlens_k: Optional[Tensor],
        max_seqlen_q: Optional[int],
        max_seqlen_k: Optional[int],
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Optional[Tensor],
        return_softmax: bool,
        block_table: Optional[Tensor],
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        packed = tuple(x for x in (a, b, c) if x is not None)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        rule = (dropout_p, softmax_scale, causal)
        scores = (window_size_left, window_size_right, softcap, alibi_slopes)
        out, lse, s_dmask, rng_state = _forward(
            packed, lengths, rule, scores, return_softmax, block_table
        )
        ctx.save_for_backward(
            a, b, c, out, lse, rng_state, cu_seqlens_q, cu_seqlens_k, alibi_slopes
        )
        ctx.max_seqlens, ctx.rule, ctx.window_and_softcap = lengths[2:], rule, scores[:3]
        ctx.deterministic, ctx.is_paged = deterministic, block_table is not None
        ctx.mark_non_differentiable(lse, s_dmask)
        ctx.set_materialize_grads(False)
        return out, lse, s_dmask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Optional[Tensor], *ignored: Any) -> tuple[Optional[Tensor], ...]:
        num_inputs = len(ctx.needs_input_grad)
        if dout is None:
            return (None,) * num_inputs
        if ctx.is_paged:
            _arguments.fail(
                "flash_attn_varlen_func",
                "attention over pages has no backward; detach q, k and v",
                "a block_table",
            )
        a, b, c, out, lse, rng_state, cu_seqlens_q, cu_seqlens_k, slopes = ctx.saved_tensors
        packed = tuple(x for x in (a, b, c) if x is not None)
        grads = tuple(torch.empty_like(x) for x in packed)
        tensors = (dout, *split(packed), out, lse, *split(grads))
        tail = (*ctx.rule, *ctx.window_and_softcap, slopes, ctx.deterministic, rng_state)
        if cu_seqlens_q is None:
            torch.ops.flash_attn._flash_attn_backward(*tensors, *tail)
        else:
            lengths = (cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens)
            torch.ops.flash_attn._flash_attn_varlen_backward(*tensors, *lengths, *tail)
        return grads + (None,) * (num_inputs - len(grads))


def attend(
    name: str,
    packed: tuple[Tensor, ...],
    lengths: Lengths,
    options: tuple[Any, ...],
    block_table: Optional[Tensor] = None,
) -> Any:
    """The result of public function `name`: out, or (out, softmax_lse, S_dmask) if asked for.

    `options` are dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, return_attn_probs, is_grad_enabled, in the published order.
    """
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes = options[:6]
    deterministic, return_attn_probs, is_grad_enabled = options[6:]
    _check_packing(name, packed, is_varlen=lengths[0] is not None)
    if softmax_scale is None:
        softmax_scale = _arguments.default_scale(packed[0])
    rule = (dropout_p, softmax_scale, causal)
    scores = (*_arguments.window(name, window_size), softcap, alibi_slopes)
    return_softmax = return_attn_probs and dropout_p > 0
    needs_grad = is_grad_enabled and any(x.requires_grad for x in packed)
    needs_grad = needs_grad or in_forward_mode()
    try:
        if needs_grad:
            inputs = distinct(packed) + (None,) * (3 - len(packed))
            cu_seqlens = distinct(lengths[:2])
            result = Attention.apply(
                *inputs,
                *cu_seqlens,
                *lengths[2:],
                *rule,
                *scores,
                return_softmax,
                block_table,
                deterministic,
            )
        else:
            result = _forward(packed, lengths, rule, scores, return_softmax, block_table)[:3]
    except (RuntimeError, TypeError, ValueError) as error:
        op = _ops.FORWARD if lengths[0] is None else _ops.VARLEN_FORWARD
        raise _arguments.renamed(error, op, name) from error.__cause__
    return result if return_attn_probs else result[0]


def _check_packing(name: str, packed: tuple[Tensor, ...], is_varlen: bool) -> None:
    """What `split` relies on; the op checks the rest on q, k and v."""
    arguments = (("qkv",), ("q", "kv"), ("q", "k", "v"))[len(packed) - 1]
    _arguments.check_tensors(name, **dict(zip(arguments, packed)))
    if len(packed) < 3:
        _arguments.check_packed(
            name, arguments[-1], packed[-1], 4 - len(packed), 4 if is_varlen else 5
        )
