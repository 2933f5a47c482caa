"""The autograd rule of the public functions: one for every packing, dense or varlen.

Packed inputs are split into views, and packed gradients are written through the same views: no
copies either way.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from flash_attn import _arguments, _ops

Lengths = tuple[Optional[Tensor], Optional[Tensor], Optional[int], Optional[int]]
DENSE: Lengths = (None, None, None, None)
_OPS = torch.ops.flash_attn


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


class Call(NamedTuple):
    """One call but for its tensors q, k, v, in the operators' order."""

    lengths: Lengths
    rule: tuple[float, float, bool]  # dropout_p, softmax_scale, causal
    scores: tuple[int, int, float, Optional[Tensor]]  # window, softcap, alibi_slopes
    return_softmax: bool
    block_table: Optional[Tensor]
    deterministic: bool
    return_attn_probs: bool

    def forward(self, packed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out, softmax_lse, S_dmask, rng_state of the dense or the varlen op."""
        q, k, v = split(packed)
        lengths, rule, scores, return_softmax, block_table, _, _ = self
        if lengths[0] is None:
            return _OPS._flash_attn_forward(q, k, v, *rule, *scores, return_softmax)
        return _OPS._flash_attn_varlen_forward(
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


def _is_differentiated(packed: tuple[Tensor, ...], is_grad_enabled: bool) -> bool:
    """Whether the autograd rule must see the call.

    Forward mode must meet it too, because its missing rule is an error there, while the operators
    would silently drop the tangent.
    """
    if is_grad_enabled:
        for x in packed:
            if x.requires_grad:
                return True
    return forward_ad._current_level >= 0


class Attention(torch.autograd.Function):
    """out, or (out, softmax_lse, S_dmask), of (qkv), (q, kv) or (q, k, v).

    Gradients flow through out alone. `b` and `c` are None where a packing has fewer tensors. The
    rest is one argument, because each one costs time in every call.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Optional[Tensor], c: Optional[Tensor], call: Call
    ) -> Union[Tensor, tuple[Tensor, Tensor, Tensor]]:
        out, lse, s_dmask, rng_state = call.forward(_present(a, b, c))
        ctx.save_for_backward(a, b, c, out, lse, rng_state)
        ctx.call = call
        if not call.return_attn_probs:
            return out
        ctx.mark_non_differentiable(lse, s_dmask)
        ctx.set_materialize_grads(False)
        return out, lse, s_dmask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Optional[Tensor], *ignored: Any) -> tuple[Optional[Tensor], ...]:
        lengths, rule, scores, _, block_table, deterministic, _ = ctx.call
        if dout is None:
            return None, None, None, None
        if block_table is not None:
            _arguments.fail(
                "flash_attn_varlen_func",
                "attention over pages has no backward; detach q, k and v",
                "a block_table",
            )
        a, b, c, out, lse, rng_state = ctx.saved_tensors
        packed = _present(a, b, c)
        grads = tuple(torch.empty_like(x) for x in packed)
        tensors = (dout, *split(packed), out, lse, *split(grads))
        tail = (*rule, *scores, deterministic, rng_state)
        if lengths[0] is None:
            _OPS._flash_attn_backward(*tensors, *tail)
        else:
            _OPS._flash_attn_varlen_backward(*tensors, *lengths, *tail)
        return grads + (None,) * (4 - len(grads))


def _present(a: Tensor, b: Optional[Tensor], c: Optional[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that there are."""
    if b is None:
        return (a,)
    return (a, b) if c is None else (a, b, c)


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
    dropout_p, softmax_scale, causal, window_size, softcap, slopes, *more = options
    deterministic, return_attn_probs, is_grad_enabled = more
    _check_packing(name, packed, is_varlen=lengths[0] is not None)
    if softmax_scale is None:
        softmax_scale = _arguments.default_scale(packed[0])
    left, right = _arguments.window(name, window_size)
    call = Call(
        lengths,
        (dropout_p, softmax_scale, causal),
        (left, right, softcap, slopes),
        return_attn_probs and dropout_p > 0,
        block_table,
        deterministic,
        return_attn_probs,
    )
    try:
        if not _is_differentiated(packed, is_grad_enabled):
            result = call.forward(packed)
            return result[:3] if return_attn_probs else result[0]
        inputs = distinct(packed) + (None,) * (3 - len(packed))
        return Attention.apply(*inputs, call)
    except (RuntimeError, TypeError, ValueError) as error:
        op = _ops.FORWARD if lengths[0] is None else _ops.VARLEN_FORWARD
        raise _arguments.renamed(error, op, name) from error.__cause__


_ARGUMENTS = {1: ("qkv",), 2: ("q", "kv"), 3: ("q", "k", "v")}


def _check_packing(name: str, packed: tuple[Tensor, ...], is_varlen: bool) -> None:
    """What `split` relies on; the op checks the rest on q, k and v."""
    arguments = _ARGUMENTS[len(packed)]
    for argument, x in zip(arguments, packed):
        if not isinstance(x, Tensor):
            _arguments.check_tensors(name, **{argument: x})
    if len(packed) < 3:
        _arguments.check_packed(
            name, arguments[-1], packed[-1], 4 - len(packed), 4 if is_varlen else 5
        )
