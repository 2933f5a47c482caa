"""The public functions of `flash_attn` 2.8.3 and the private names that other projects import.

Shapes: q (b, sq, hq, d), k and v (b, sk, hk, d) and out (b, sq, hq, dv); packed sequences have
(total, h, d) instead, with `cu_seqlens` (b + 1,) int32 as row offsets. hq must be a multiple of hk;
query head i reads key-value head i // (hq / hk). fp16 and bf16 everywhere, float32 and float64 on
the CPU too; d <= 256, any value.

Arguments that the functions share:
    dropout_p: probability of dropping an entry of softmax(scores); 0.0 for inference.
    softmax_scale: factor on q k^T; None is d ** -0.5.
    causal: key j is visible to query i iff j <= i + sk - sq (aligned to the bottom right corner).
    window_size: (left, right); key j is visible iff i + sk - sq - left <= j <= i + sk - sq + right.
        -1 is no bound.
    softcap: c > 0 replaces a scaled score s by c * tanh(s / c).
    alibi_slopes: (hq,) or (b, hq) float32; adds -slope * |i + sk - sq - j| to the score.
    deterministic: bitwise reproducible gradients, at some cost in speed and memory.
    return_attn_probs: also return softmax_lse and S_dmask (for testing).

Results: out, of q's dtype. softmax_lse: (b, hq, sq), or (hq, total_q) for packed sequences, float32
(float64 for float64 inputs), the natural logarithm of the sum of exp(scores). A query that sees no
key has out 0 and softmax_lse +inf. S_dmask: (b, hq, round128(sq), round128(sk)), exp(score - row
maximum), negative where dropped; empty without dropout. Gradients flow through out alone.

Errors: RuntimeError with the published wording for the published rules, ValueError and TypeError
for others, before any kernel runs; each names the function, the rule and what was given.

Sources: FlashAttention (arXiv:2205.14135), FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

import flash_attn_2_cuda as flash_attn_gpu  # noqa: F401 (xformers and others take it from here)
from flash_attn._attention import DENSE, attend, packed_lengths
from flash_attn._fakes import backward as _flash_attn_backward_fake  # noqa: F401
from flash_attn._fakes import forward as _flash_attn_forward_fake  # noqa: F401
from flash_attn._fakes import varlen_backward as _flash_attn_varlen_backward_fake  # noqa: F401
from flash_attn._fakes import varlen_forward as _flash_attn_varlen_forward_fake  # noqa: F401
from flash_attn._kvcache import check_cache, check_fa2_cache, with_kvcache

USE_TRITON_ROCM = False

_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (b, sq, hq, d) over k, v (b, sk, hk, d).

    Returns out (b, sq, hq, d), or (out, softmax_lse, S_dmask) with `return_attn_probs`. Arguments
    and errors: see the module.
    """
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )
    return attend("flash_attn_func", (q, k, v), DENSE, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v stacked as kv (b, sk, 2, hk, d); no copy is made, and kv's
    gradient is written in one piece.
    """
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )
    return attend("flash_attn_kvpacked_func", (q, kv), DENSE, options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v stacked as qkv (b, s, 3, h, d); no copy is made, and qkv's
    gradient is written in one piece.
    """
    options = (
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )
    return attend("flash_attn_qkvpacked_func", (qkv,), DENSE, options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Optional[Tensor] = None,
) -> Any:
    """Attention of packed sequences: q (total_q, hq, d), k and v (total_k, hk, d).

    Sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] and likewise keys; none may be
    longer than `max_seqlen_q`, `max_seqlen_k`. With `block_table` (b, max_pages) int32, k and v are
    pages (num_pages, page_size, hk, d) of any size, and `cu_seqlens_k` only counts the keys; that
    form has no backward.

    Returns out (total_q, hq, d), or (out, softmax_lse, S_dmask) with `return_attn_probs`.
    """
    return FlashAttnVarlenFunc.apply(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        block_table,
        torch.is_grad_enabled(),
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v stacked as kv (total_k, 2, hk, d)."""
    return FlashAttnVarlenKVPackedFunc.apply(
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v stacked as qkv (total, 3, h, d)."""
    return FlashAttnVarlenQKVPackedFunc.apply(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        torch.is_grad_enabled(),
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Optional[Tensor] = None,
    v: Optional[Tensor] = None,
    rotary_cos: Optional[Tensor] = None,
    rotary_sin: Optional[Tensor] = None,
    cache_seqlens: Optional[Union[int, Tensor]] = None,
    cache_batch_idx: Optional[Tensor] = None,
    cache_leftpad: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Optional[Tensor] = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q (b, sq, hq, d) over a cache, which may grow first; inference only.

    Args:
        k_cache, v_cache: (b_cache, s_cache, hk, d), or pages (num_pages, page_size, hk, d) of any
            size with `block_table`. Written in place if `k` is given.
        k, v: (b, s_new, hk, d) new keys and values, stored from position cache_seqlens[i] on.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2), rotary_dim a multiple of 16. New key i
            is rotated as position cache_seqlens + i; so is query i under a causal or local mask,
            else all queries are rotated as position cache_seqlens.
        cache_seqlens: int or (b,) int32, keys in the cache before the append; None: all.
        cache_batch_idx: (b,) int32, cache row of each sequence; not with `block_table`.
        cache_leftpad: (b,) int32, keys to skip at the start of a cache row; not with `block_table`.
        block_table: (b, max_pages) int32.
        rotary_interleaved: rotate features (0, 1), (2, 3) ... (GPT-J) rather than i and
            i + rotary_dim / 2 (GPT-NeoX).
        num_splits: parts that the keys are cut into for parallel work; 0 chooses.

    Lengths and indices that point outside the cache are a ValueError on the CPU. A call on a GPU
    does not wait to read them; its kernels see fewer keys then, and never read or write outside.

    Returns:
        out (b, sq, hq, d), or (out, softmax_lse (b, hq, sq)) with `return_softmax_lse`.
    """
    name = "flash_attn_with_kvcache"
    check_cache(name, q, k_cache, v_cache)
    check_fa2_cache(name, num_splits, cache_batch_idx, cache_leftpad, block_table)
    out, softmax_lse = with_kvcache(
        name,
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        table_name="block_table",
    )
    return (out, softmax_lse) if return_softmax_lse else out


def _flash_attn_forward(
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
    """The op of dense calls: out, softmax_lse, S_dmask, rng_state; no autograd.

    rng_state is (2,) int64, the seed and offset of dropout; `_flash_attn_backward` takes it.
    """
    return _wrapped_flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    )


def _flash_attn_varlen_forward(
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
    """The op of packed calls: out, softmax_lse, S_dmask, rng_state; no autograd.

    `leftpad_k` and `seqused_k` (b,) int32 restrict each sequence to keys [leftpad, seqused). Rows
    of no sequence are always zero, so `zero_tensors` changes nothing.
    """
    return _wrapped_flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
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


def _flash_attn_backward(
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
    """The op of dense gradients: dq, dk, dv are written in place, softmax_d is returned.

    softmax_d (b, hq, round128(sq)) is rowsum(dout * out).
    """
    return _wrapped_flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
    )


def _flash_attn_varlen_backward(
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
    """The op of packed gradients: dq, dk, dv are written in place, softmax_d is returned.

    softmax_d is (hq, total_q + 128 b). Gradients of rows of no sequence are always zero.
    """
    return _wrapped_flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
        zero_tensors,
    )


def maybe_contiguous(x: Optional[Tensor]) -> Optional[Tensor]:
    """x, copied only if its last dimension is not contiguous."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Width of the column blocks whose running maximum S_dmask is relative to.

    Here S_dmask is relative to the maximum of the whole row, so one block holds any row.
    """
    return 1 << 30


class FlashAttnFunc:
    """Positional form of `flash_attn_func`."""

    @staticmethod
    def apply(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
        """`options`: dropout_p, ..., return_softmax, is_grad_enabled, as the function has them."""
        return attend("flash_attn_func", (q, k, v), DENSE, options)


class FlashAttnKVPackedFunc:
    """Positional form of `flash_attn_kvpacked_func`."""

    @staticmethod
    def apply(q: Tensor, kv: Tensor, *options: Any) -> Any:
        """`options`: as `FlashAttnFunc.apply`."""
        return attend("flash_attn_kvpacked_func", (q, kv), DENSE, options)


class FlashAttnQKVPackedFunc:
    """Positional form of `flash_attn_qkvpacked_func`."""

    @staticmethod
    def apply(qkv: Tensor, *options: Any) -> Any:
        """`options`: as `FlashAttnFunc.apply`."""
        return attend("flash_attn_qkvpacked_func", (qkv,), DENSE, options)


class FlashAttnVarlenFunc:
    """Positional form of `flash_attn_varlen_func`."""

    @staticmethod
    def apply(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *options: Any,
    ) -> Any:
        """`options`: dropout_p, ..., return_softmax, block_table, is_grad_enabled."""
        name = "flash_attn_varlen_func"
        lengths = packed_lengths(name, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        *rest, block_table, is_grad_enabled = options
        options = (*rest, is_grad_enabled)
        return attend(name, (q, k, v), lengths, options, block_table)


class FlashAttnVarlenKVPackedFunc:
    """Positional form of `flash_attn_varlen_kvpacked_func`."""

    @staticmethod
    def apply(
        q: Tensor,
        kv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *options: Any,
    ) -> Any:
        """`options`: as `FlashAttnFunc.apply`."""
        name = "flash_attn_varlen_kvpacked_func"
        lengths = packed_lengths(name, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return attend(name, (q, kv), lengths, options)


class FlashAttnVarlenQKVPackedFunc:
    """Positional form of `flash_attn_varlen_qkvpacked_func`."""

    @staticmethod
    def apply(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *options: Any) -> Any:
        """`options`: as `FlashAttnFunc.apply`."""
        name = "flash_attn_varlen_qkvpacked_func"
        lengths = packed_lengths(name, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return attend(name, (qkv,), lengths, options)
