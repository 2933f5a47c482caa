"""The `flash_attn_3::` operators of attention: what FlashAttention-3's names map to.

`_flash_attn_forward` and `_flash_attn_backward` are the traceable pair behind the public functions.
`fwd` and `bwd` have the published C++ schemas, for projects that call them by position. Shapes and
options: docstrings of `flash_attn_interface`. For CUDA tensors the shim runs all but `bwd`
(`csrc/torch/ops_fa3.cpp`).
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from flash_attn import _arguments, _fakes, _flops, _ops, backends
from flash_attn._checks import check_forward
from flash_attn._kvcache import check_new_keys
from flash_attn._ops_splits import check_metadata
from flash_attn._problem import Append, Descale, Forward, Mask, Scores, Sequences
from flash_attn._registration import define, define_shared
from flash_attn.backends import cuda

FORWARD, BACKWARD = "flash_attn_3::_flash_attn_forward", "flash_attn_3::_flash_attn_backward"
FWD, BWD = "flash_attn_3::fwd", "flash_attn_3::bwd"

_KEYS = (
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, {int}? max_seqlen_q=None, "
    "{int}? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, "
    "Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None"
)
_WINDOW = "{int} window_size_left=-1, {int} window_size_right=-1"

SCHEMAS = {
    FORWARD: (
        "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, "
        f"Tensor? out_=None, {_KEYS}, bool causal=False, {_WINDOW}, {{int}} attention_chunk=0, "
        "float softcap=0., bool rotary_interleaved=True, Tensor? scheduler_metadata=None, "
        "{int} num_splits=1, bool? pack_gqa=None, {int} sm_margin=0) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ).replace("{int}", "SymInt"),
    BACKWARD: (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? sequed_q=None, "
        "Tensor? sequed_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
        "Tensor(a!)? dq=None, Tensor(b!)? dk=None, Tensor(c!)? dv=None, "
        f"float? softmax_scale=None, bool is_causal=False, {_WINDOW}, float softcap=0., "
        "bool deterministic=False, SymInt sm_margin=0) -> Tensor"
    ).replace("{int}", "SymInt"),
    FWD: (
        "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
        f"Tensor? q_v=None, Tensor(out!)? out=None, {_KEYS}, bool is_causal=False, {_WINDOW}, "
        "{int} attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
        "Tensor? scheduler_metadata=None, {int} num_splits=0, bool? pack_gqa=None, "
        "{int} sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
    ).replace("{int}", "int"),
    BWD: (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
        "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
        f"float? softmax_scale=None, bool is_causal=False, {_WINDOW}, float softcap=0., "
        "bool deterministic=False, {int} sm_margin=0) -> "
        "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
    ).replace("{int}", "int"),
}


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Optional[Tensor] = None,
    v_new: Optional[Tensor] = None,
    qv: Optional[Tensor] = None,
    out_: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    page_table: Optional[Tensor] = None,
    kv_batch_idx: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    seqlens_rotary: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Optional[Tensor] = None,
    num_splits: int = 1,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    written = {
        "k_new": k_new,
        "v_new": v_new,
        "out_": out_,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "seqlens_rotary": seqlens_rotary,
    }
    given = [argument for argument, x in written.items() if x is not None]
    if given:
        _arguments.fail(
            FORWARD,
            "the operator writes no argument, so that compilers may trace it: append through "
            "flash_attn_with_kvcache, and write into `out_` through flash_attn_3::fwd",
            ", ".join(given),
        )
    call = _forward_call(
        q,
        k,
        v,
        qv,
        (
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            leftpad_k,
            page_table,
            kv_batch_idx,
            max_seqlen_q,
            max_seqlen_k,
        ),
        (q_descale, k_descale, v_descale),
        softmax_scale,
        Mask.of(causal, window_size_left, window_size_right, attention_chunk),
        softcap,
        num_splits,
        sm_margin,
    )
    check_metadata(FORWARD, scheduler_metadata, q)
    return _run(FORWARD, call)


def _forward_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Optional[Tensor],
    sequences: tuple[Any, ...],
    descale: tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]],
    softmax_scale: Optional[float],
    mask: Mask,
    softcap: float,
    num_splits: int,
    sm_margin: int,
    append: Optional[Append] = None,
    out: Optional[Tensor] = None,
) -> Forward:
    """A call; `sequences` are the fields of `Sequences` in order."""
    scale = _arguments.scale(softmax_scale, q, qv)
    return Forward(
        q,
        k,
        v,
        Scores(scale, mask, softcap),
        Sequences(*sequences),
        append=append,
        qv=qv,
        descale=Descale(*descale),
        num_splits=num_splits,
        sm_margin=sm_margin,
        out=out,
    )


def _run(name: str, call: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_forward(name, call)
    out, lse, _ = backends.forward(call, name)
    return out, lse, *_fakes.no_partials(call.q)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    sequed_q: Optional[Tensor] = None,
    sequed_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    dq: Optional[Tensor] = None,
    dk: Optional[Tensor] = None,
    dv: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    scale = _arguments.scale(softmax_scale, q)
    scores = Scores(scale, Mask.of(is_causal, window_size_left, window_size_right), softcap)
    sequences = Sequences(
        cu_seqlens_q,
        cu_seqlens_k,
        sequed_q,
        sequed_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    tensors = (dout, q, k, v, out, softmax_lse)
    return _ops.run_backward(
        BACKWARD, tensors, (dq, dk, dv), scores, sequences, deterministic, sm_margin
    )


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Optional[Tensor] = None,
    v_new: Optional[Tensor] = None,
    q_v: Optional[Tensor] = None,
    out: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    page_table: Optional[Tensor] = None,
    kv_batch_idx: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    seqlens_rotary: Optional[Tensor] = None,
    q_descale: Optional[Tensor] = None,
    k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    is_rotary_interleaved: bool = False,
    scheduler_metadata: Optional[Tensor] = None,
    num_splits: int = 0,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_metadata(FWD, scheduler_metadata, q)
    check_new_keys(FWD, k_new, v_new, rotary_cos, rotary_sin, cu_seqlens_k_new, seqlens_rotary)
    append = None
    if k_new is not None and v_new is not None:
        rotary = (rotary_cos, rotary_sin, is_rotary_interleaved, seqlens_rotary)
        append = Append(k_new, v_new, cu_seqlens_k_new, *rotary)
    call = _forward_call(
        q,
        k,
        v,
        q_v,
        (
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_q,
            seqused_k,
            leftpad_k,
            page_table,
            kv_batch_idx,
            max_seqlen_q,
            max_seqlen_k,
        ),
        (q_descale, k_descale, v_descale),
        softmax_scale,
        Mask.of(is_causal, window_size_left, window_size_right, attention_chunk),
        softcap,
        num_splits,
        sm_margin,
        append,
        out,
    )
    return _run(FWD, call)


def _bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor] = None,
    dk: Optional[Tensor] = None,
    dv: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    seqused_q: Optional[Tensor] = None,
    seqused_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    softmax_scale: Optional[float] = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, ...]:
    grads = [torch.empty_like(x) if g is None else g for g, x in zip((dq, dk, dv), (q, k, v))]
    softmax_d = torch.ops.flash_attn_3._flash_attn_backward.default(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        *grads,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        deterministic,
        sm_margin,
    )
    # dq_accum, dk_accum and dv_accum are scratch of the published kernels; this has none.
    scratch = (q.new_empty(0, dtype=torch.float32) for _ in range(3))
    return (*grads, softmax_d, softmax_lse * math.log2(math.e), *scratch)


_LIBRARY = torch.library.Library("flash_attn_3", "FRAGMENT")
define(_LIBRARY, FORWARD, SCHEMAS[FORWARD], _forward, _fakes.forward_fa3, _flops.forward_fa3)
define(_LIBRARY, BACKWARD, SCHEMAS[BACKWARD], _backward, _fakes.backward_fa3, _flops.backward_fa3)
fwd = define_shared(_LIBRARY, FWD, SCHEMAS[FWD], _fwd, flops=_flops.forward_fa3)
define_shared(_LIBRARY, BWD, SCHEMAS[BWD], _bwd)
cuda.serve_fa3(fwd.__name__)
