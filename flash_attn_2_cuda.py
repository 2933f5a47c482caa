"""The low-level names of the `flash_attn` 2.8.3 extension module, positional as it has them.

xformers, TransformerEngine and others call these directly. They are thin maps onto the operators;
`flash_attn.flash_attn_interface` documents shapes, options and errors. The last argument of a
forward, `gen`, must be None: dropout draws from torch's default generator on the device.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from flash_attn import _arguments
from flash_attn._kvcache import check_fa2_cache, with_kvcache

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: None = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]; `out`, if given, is written and returned."""
    _check_no_generator("flash_attn_2_cuda.fwd", gen)
    _check_out("flash_attn_2_cuda.fwd", out, q, v)
    result = torch.ops.flash_attn._flash_attn_forward(
        q,
        k,
        v,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    )
    return _into(out, result)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Optional[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Optional[Tensor],
    leftpad_k: Optional[Tensor],
    block_table: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: None = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]; `out`, if given, is written and returned."""
    _check_no_generator("flash_attn_2_cuda.varlen_fwd", gen)
    _check_out("flash_attn_2_cuda.varlen_fwd", out, q, v)
    result = torch.ops.flash_attn._flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
        block_table,
        leftpad_k,
        seqused_k,
        zero_tensors,
    )
    return _into(out, result)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: None = None,
    rng_state: Optional[Tensor] = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d]; gradients given are written in place and returned."""
    _check_no_generator("flash_attn_2_cuda.bwd", gen)
    grads = _gradients((dq, dk, dv), (q, k, v))
    softmax_d = torch.ops.flash_attn._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        *grads,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
    )
    return [*grads, softmax_d]


def varlen_bwd(
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
    alibi_slopes: Optional[Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: None = None,
    rng_state: Optional[Tensor] = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d]; gradients given are written in place and returned."""
    _check_no_generator("flash_attn_2_cuda.varlen_bwd", gen)
    grads = _gradients((dq, dk, dv), (q, k, v))
    softmax_d = torch.ops.flash_attn._flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        *grads,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
        zero_tensors,
    )
    return [*grads, softmax_d]


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: Optional[Tensor],
    v: Optional[Tensor],
    seqlens_k: Optional[Tensor],
    rotary_cos: Optional[Tensor],
    rotary_sin: Optional[Tensor],
    cache_batch_idx: Optional[Tensor],
    leftpad_k: Optional[Tensor],
    block_table: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    out: Optional[Tensor],
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """[out, softmax_lse]; `out`, if given, is written and returned."""
    name = "flash_attn_2_cuda.fwd_kvcache"
    _check_out(name, out, q, vcache)
    check_fa2_cache(name, num_splits, cache_batch_idx, leftpad_k, block_table)
    result = with_kvcache(
        name,
        q,
        kcache,
        vcache,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=seqlens_k,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=leftpad_k,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        rotary_interleaved=is_rotary_interleaved,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
    )
    return _into(out, result)


def _check_no_generator(name: str, gen: Any) -> None:
    if gen is not None:
        _arguments.fail(
            name,
            "the RNG `generator` argument is no longer supported and must be None; seed dropout "
            "with torch.manual_seed",
            type(gen).__name__,
        )


def _check_out(name: str, out: Optional[Tensor], q: Tensor, v: Tensor) -> None:
    if out is None:
        return
    if out.dtype != q.dtype:
        _arguments.fail(
            name, "Output must have the same dtype as inputs", f"{out.dtype}, {q.dtype}"
        )
    shape = (*q.shape[:-1], v.shape[-1])
    if out.shape != shape:
        _arguments.fail(name, f"out must have shape {tuple(shape)}", f"shape {tuple(out.shape)}")


def _into(out: Optional[Tensor], result: tuple[Tensor, ...]) -> list[Tensor]:
    """`result` with its first tensor moved into `out`."""
    first, *rest = result
    return [first if out is None else out.copy_(first), *rest]


def _gradients(
    grads: tuple[Optional[Tensor], ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) if g is None else g for g, x in zip(grads, inputs))
