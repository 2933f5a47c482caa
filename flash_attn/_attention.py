"""The autograd rule of the public functions: one for every packing, dense or varlen.

Packed inputs are split into views, and packed gradients are written through the same views: no
copies either way.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from flash_attn import _arguments, _ops
from flash_attn.backends import cuda

# What a varlen function says about its sequences, in the operators' order; of a dense one nothing.
Lengths = Union[tuple[()], tuple[Tensor, Tensor, int, int]]
DENSE: Lengths = ()


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


Forward = Callable[..., tuple[Tensor, ...]]  # out, softmax_lse and, but for a plain one, the rest


class Operators(NamedTuple):
    """The operators behind a public function, by overload: a packet of overloads is slower.

    `plain_forward` is `forward` without the results that only dropout fills, S_dmask and rng_state:
    memory for them takes a sixth of a call's time.
    """

    name: str
    forward: Forward
    plain_forward: Forward
    backward: Callable[..., Tensor]


_OPS, _PLAIN_OPS = torch.ops.flash_attn, torch.ops.flash_attn_cuda

# Where `cuda.IS_DIRECT` says so, the shim runs them for CUDA tensors.
_PLAIN_LIBRARY = torch.library.Library("flash_attn_cuda", "FRAGMENT")
for _name in (_ops.FORWARD, _ops.VARLEN_FORWARD):
    _short_name, (_takes, _) = _name.split("::")[1], _ops.SCHEMAS[_name].split(" -> ")
    _PLAIN_LIBRARY.define(f"{_short_name}{_takes} -> (Tensor, Tensor)")
    _PLAIN_LIBRARY.impl(_short_name, torch.library.fallthrough_kernel, "Autograd")


def _bare(operator: Any) -> Forward:
    """What `operator.__call__` calls, without the time of that Python."""
    return getattr(operator, "_op", operator)  # type: ignore[no-any-return]


_DENSE = Operators(
    _ops.FORWARD,
    _OPS._flash_attn_forward.default,
    _bare(_PLAIN_OPS._flash_attn_forward.default),
    _OPS._flash_attn_backward.default,
)
_VARLEN = Operators(
    _ops.VARLEN_FORWARD,
    _OPS._flash_attn_varlen_forward.default,
    _bare(_PLAIN_OPS._flash_attn_varlen_forward.default),
    _OPS._flash_attn_varlen_backward.default,
)


def is_watched(packed: tuple[Tensor, ...]) -> bool:
    """Whether a compiler, a transform, a mode or a kind of tensor may want the published operator,
    which it knows by name.
    """
    for x in packed:
        if type(x) is not Tensor and type(x) is not Parameter:
            return True
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._is_tracing()
    )


class Call(NamedTuple):
    """What the autograd rule must know of a call beside its tensors."""

    forward: Forward
    backward: Callable[..., Tensor]
    cu_seqlens: tuple[Tensor, ...]  # two, or none of a dense call
    rules: tuple[Any, ...]  # what both take then: max_seqlens, dropout_p, ..., alibi_slopes
    options: tuple[Any, ...]  # what the forward operator takes after them
    has_dropout: bool
    is_paged: bool
    deterministic: bool
    return_attn_probs: bool


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


def is_differentiated(packed: tuple[Tensor, ...], is_grad_enabled: bool) -> bool:
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
        q, k, v = split(present(a, b, c))
        forward, _, cu_seqlens, rules, options, has_dropout, _, _, return_attn_probs = call
        out, lse, *rest = forward(q, k, v, *cu_seqlens, *rules, *options)
        # Saved, as autograd then refuses a backward pass with other boundaries than these.
        ctx.save_for_backward(a, b, c, out, lse, rest[1] if has_dropout else None, *cu_seqlens)
        ctx.call = call
        if not return_attn_probs:
            return out
        s_dmask = rest[0]
        ctx.mark_non_differentiable(lse, s_dmask)
        ctx.set_materialize_grads(False)
        return out, lse, s_dmask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Optional[Tensor], *ignored: Any) -> tuple[Optional[Tensor], ...]:
        if dout is None:
            return None, None, None, None
        call = ctx.call
        if call.is_paged:
            _arguments.fail(
                "flash_attn_varlen_func",
                "attention over pages has no backward; detach q, k and v",
                "a block_table",
            )
        a, b, c, out, lse, rng_state, *cu_seqlens = ctx.saved_tensors
        packed = present(a, b, c)
        grads = tuple(torch.empty_like(x) for x in packed)
        tensors = (dout, *split(packed), out, lse, *split(grads))
        call.backward(*tensors, *cu_seqlens, *call.rules, call.deterministic, rng_state)
        return grads + (None,) * (4 - len(grads))


# `Function.apply` without its Python, which takes longer than all of a call's checks.
_bare_apply = super(torch.autograd.Function, Attention).apply


def _differentiably(packed: tuple[Tensor, ...], call: Call, watched: bool) -> Any:
    """The result of `Attention`."""
    others = (None,) * (3 - len(packed))
    if watched:
        return Attention.apply(*distinct(packed), *others, call)
    return _bare_apply(*map(unwrap_if_dead, packed), *others, call)


def present(a: Tensor, b: Optional[Tensor], c: Optional[Tensor]) -> tuple[Tensor, ...]:
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
    (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        slopes,
        deterministic,
        return_attn_probs,
        is_grad_enabled,
    ) = options
    _check_packing(name, packed, is_varlen=len(lengths) > 0)
    has_dropout = _arguments.is_positive(name, "dropout_p", dropout_p)
    softmax_scale = _arguments.scale(softmax_scale, packed[0])
    left, right = _arguments.window(name, window_size)
    operators = _VARLEN if lengths else _DENSE
    watched = is_watched(packed)
    wants_all = return_attn_probs or dropout_p != 0
    is_plain = cuda.IS_DIRECT and packed[0].is_cuda and not (wants_all or watched)
    forward = operators.plain_forward if is_plain else operators.forward
    cu_seqlens = lengths[:2]
    rules = (*lengths[2:], dropout_p, softmax_scale, causal, left, right, softcap, slopes)
    return_softmax = return_attn_probs and has_dropout
    choices = (return_softmax, block_table) if lengths else (return_softmax,)
    try:
        if not is_differentiated(packed, is_grad_enabled):
            results = forward(*split(packed), *cu_seqlens, *rules, *choices)
            return results[:3] if return_attn_probs else results[0]
        call = Call(
            forward,
            operators.backward,
            cu_seqlens,
            rules,
            choices,
            has_dropout,
            block_table is not None,
            deterministic,
            return_attn_probs,
        )
        return _differentiably(packed, call, watched)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        if cuda.gives_way(packed[0].device):
            return attend(name, packed, lengths, options, block_table)
        raise _arguments.renamed(error, operators.name, name) from error.__cause__


_ARGUMENTS = {1: ("qkv",), 2: ("q", "kv"), 3: ("q", "k", "v")}


def _check_packing(name: str, packed: tuple[Tensor, ...], is_varlen: bool) -> None:
    """What `split` relies on; the op checks the rest on q, k and v."""
    for x in packed:
        if not isinstance(x, Tensor):
            _arguments.check_tensors(name, **dict(zip(_ARGUMENTS[len(packed)], packed)))
    if len(packed) < 3:
        argument = _ARGUMENTS[len(packed)][-1]
        count, rank = 4 - len(packed), 4 if is_varlen else 5
        _arguments.check_packed(name, argument, packed[-1], count, rank)
