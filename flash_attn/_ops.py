"""The `flash_attn::` operators: published schemas, and what they do.

Each runs on the backend that `backends` chooses; `_fakes` and `_flops` know its shapes and cost.
They are not differentiable by themselves: `_attention` holds the autograd rule, and selective
checkpointing, FLOP counters and compilers see the operators. Arguments and results: docstrings of
`flash_attn.flash_attn_interface`.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn import _fakes, _flops, backends
from flash_attn._checks import check_backward, check_forward
from flash_attn._problem import Append, Backward, Descale, Forward, Mask, Scores, Sequences
from flash_attn._registration import define

_SCORES = "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes"
_BACKWARD = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse"
_GRADS = "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv"
_VARLEN = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float dropout_p, float softmax_scale, bool causal"
)

FORWARD, VARLEN_FORWARD = (
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
)
BACKWARD, VARLEN_BACKWARD = (
    "flash_attn::_flash_attn_backward",
    "flash_attn::_flash_attn_varlen_backward",
)
WITH_KVCACHE = "flash_attn::_flash_attn_with_kvcache"

SCHEMAS = {
    FORWARD: (
        "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
        f"{_SCORES}, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    VARLEN_FORWARD: (
        f"(Tensor q, Tensor k, Tensor v, {_VARLEN}, SymInt window_size_left=-1, "
        "SymInt window_size_right=-1, float softcap=0., Tensor? alibi_slopes=None, "
        "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, "
        "Tensor? seqused_k=None, bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    BACKWARD: (
        f"({_BACKWARD}, {_GRADS}, float dropout_p, float softmax_scale, bool causal, {_SCORES}, "
        "bool deterministic, Tensor? rng_state=None) -> Tensor"
    ),
    VARLEN_BACKWARD: (
        f"({_BACKWARD}, {_GRADS}, {_VARLEN}, {_SCORES}, bool deterministic, "
        "Tensor? rng_state=None, bool zero_tensors=False) -> Tensor"
    ),
    # The published packages reach the KV cache through an untraceable extension call; this is the
    # one operator behind FlashAttention-2's and FlashAttention-3's `flash_attn_with_kvcache`.
    WITH_KVCACHE: (
        "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor? qv, "
        "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_seqlens, Tensor? cache_batch_idx, "
        "Tensor? cache_leftpad, Tensor? block_table, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k_new, SymInt? max_seqlen_q, Tensor? rotary_seqlens, "
        "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, "
        "bool causal, SymInt window_size_left, SymInt window_size_right, SymInt attention_chunk, "
        "float softcap, bool rotary_interleaved, Tensor? alibi_slopes, SymInt num_splits, "
        "SymInt sm_margin=0) -> (Tensor, Tensor)"
    ),
}


def draw_rng_state(q: Tensor, dropout_p: float) -> Tensor:
    """(2,) int64 seed and offset on q's device: drawn there, so that CUDA graphs replay the draw.

    Without dropout nothing is drawn and torch's generator stays as it is.
    """
    rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    return rng_state.random_() if dropout_p > 0 else rng_state


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = Mask.of(causal, window_size_left, window_size_right)
    return run_forward(
        FORWARD,
        q,
        k,
        v,
        Sequences(),
        mask,
        softmax_scale,
        softcap,
        alibi_slopes,
        dropout_p,
        return_softmax,
    )


def _varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    return_softmax: bool = False,
    block_table: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = Sequences(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        block_table=block_table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    mask = Mask.of(causal, window_size_left, window_size_right)
    return run_forward(
        VARLEN_FORWARD,
        q,
        k,
        v,
        sequences,
        mask,
        softmax_scale,
        softcap,
        alibi_slopes,
        dropout_p,
        return_softmax,
    )


def run_forward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    mask: Mask,
    softmax_scale: float,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    dropout_p: float,
    return_softmax: bool,
    out: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check and run a forward call: out, softmax_lse, S_dmask, rng_state."""
    rng_state = draw_rng_state(q, dropout_p)
    used_state = rng_state if dropout_p > 0 else None
    scores = Scores(softmax_scale, mask, softcap, alibi_slopes, dropout_p, used_state)
    call = Forward(q, k, v, scores, sequences, return_softmax=return_softmax, out=out)
    check_forward(name, call)
    return (*backends.forward(call, name), rng_state)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    deterministic: bool,
    rng_state: Optional[Tensor] = None,
) -> Tensor:
    used_state = rng_state if dropout_p > 0 else None
    mask = Mask.of(causal, window_size_left, window_size_right)
    scores = Scores(softmax_scale, mask, softcap, alibi_slopes, dropout_p, used_state)
    return run_backward(
        BACKWARD,
        (dout, q, k, v, out, softmax_lse),
        (dq, dk, dv),
        scores,
        Sequences(),
        deterministic,
    )


def _varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Optional[Tensor],
    deterministic: bool,
    rng_state: Optional[Tensor] = None,
    zero_tensors: bool = False,
) -> Tensor:
    used_state = rng_state if dropout_p > 0 else None
    mask = Mask.of(causal, window_size_left, window_size_right)
    scores = Scores(softmax_scale, mask, softcap, alibi_slopes, dropout_p, used_state)
    sequences = Sequences(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return run_backward(
        VARLEN_BACKWARD,
        (dout, q, k, v, out, softmax_lse),
        (dq, dk, dv),
        scores,
        sequences,
        deterministic,
    )


def run_backward(
    name: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]],
    scores: Scores,
    sequences: Sequences,
    deterministic: bool,
    sm_margin: int = 0,
) -> Tensor:
    """Check and run a backward call. A gradient given as None is computed and dropped."""
    _, q, k, v, _, _ = tensors
    dq, dk, dv = (
        torch.empty_like(x) if grad is None else grad for grad, x in zip(grads, (q, k, v))
    )
    call = Backward(*tensors, dq, dk, dv, scores, sequences, deterministic, sm_margin)
    check_backward(name, call)
    return backends.backward(call, name)


def _with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor],
    v: Optional[Tensor],
    qv: Optional[Tensor],
    rotary_cos: Optional[Tensor],
    rotary_sin: Optional[Tensor],
    cache_seqlens: Optional[Tensor],
    cache_batch_idx: Optional[Tensor],
    cache_leftpad: Optional[Tensor],
    block_table: Optional[Tensor],
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k_new: Optional[Tensor],
    max_seqlen_q: Optional[int],
    rotary_seqlens: Optional[Tensor],
    q_descale: Optional[Tensor],
    k_descale: Optional[Tensor],
    v_descale: Optional[Tensor],
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    attention_chunk: int,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Optional[Tensor],
    num_splits: int,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    append = None
    if k is not None and v is not None:
        append = Append(
            k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens
        )
    mask = Mask.of(causal, window_size_left, window_size_right, attention_chunk)
    call = Forward(
        q,
        k_cache,
        v_cache,
        Scores(softmax_scale, mask, softcap, alibi_slopes),
        Sequences(
            cu_seqlens_q=cu_seqlens_q,
            seqused_k=cache_seqlens,
            leftpad_k=cache_leftpad,
            block_table=block_table,
            kv_batch_idx=cache_batch_idx,
            max_seqlen_q=max_seqlen_q,
        ),
        append=append,
        qv=qv,
        descale=Descale(q_descale, k_descale, v_descale),
        num_splits=num_splits,
        sm_margin=sm_margin,
    )
    check_forward(WITH_KVCACHE, call)
    out, lse, _ = backends.forward(call, WITH_KVCACHE)
    return out, lse


_LIBRARY = torch.library.Library("flash_attn", "FRAGMENT")
for _name, _implementation, _fake, _flop_formula, _draws in (
    (FORWARD, _forward, _fakes.forward, _flops.forward, True),
    (VARLEN_FORWARD, _varlen_forward, _fakes.varlen_forward, _flops.varlen_forward, True),
    (BACKWARD, _backward, _fakes.backward, _flops.backward, False),
    (VARLEN_BACKWARD, _varlen_backward, _fakes.varlen_backward, _flops.varlen_backward, False),
    (WITH_KVCACHE, _with_kvcache, _fakes.with_kvcache, _flops.with_kvcache, False),
):
    define(_LIBRARY, _name, SCHEMAS[_name], _implementation, _fake, _flop_formula, draws=_draws)
