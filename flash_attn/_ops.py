"""The `flash_attn::` operators: published schemas, fake (shape) rules and FLOP formulas.

Each runs on the backend that `backends` chooses. They are not differentiable by themselves:
`_attention` holds the autograd rule, and selective checkpointing, FLOP counters and compilers see
the operators. Arguments and results: docstrings of `flash_attn.flash_attn_interface`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_attn import _support, backends
from flash_attn._checks import check_backward, check_forward
from flash_attn._problem import Append, Backward, Descale, Forward, Mask, Scores, Sequences

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
        "float softcap, bool rotary_interleaved, Tensor? alibi_slopes, SymInt num_splits) "
        "-> (Tensor, Tensor)"
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
    return _run_forward(
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
    return _run_forward(
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


def _run_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng_state = draw_rng_state(q, dropout_p)
    used_state = rng_state if dropout_p > 0 else None
    scores = Scores(softmax_scale, mask, softcap, alibi_slopes, dropout_p, used_state)
    call = Forward(q, k, v, scores, sequences, return_softmax=return_softmax)
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
) -> Tensor:
    """Check and run a backward call. A gradient given as None is computed and dropped."""
    _, q, k, v, _, _ = tensors
    dq, dk, dv = (
        torch.empty_like(x) if grad is None else grad for grad, x in zip(grads, (q, k, v))
    )
    call = Backward(*tensors, dq, dk, dv, scores, sequences, deterministic)
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
    )
    check_forward(WITH_KVCACHE, call)
    out, lse, _ = backends.forward(call, WITH_KVCACHE)
    return out, lse


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """softmax_lse is float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake_out_and_lse(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of out and softmax_lse; q is (b, sq, hq, d), or (total_q, hq, d) if packed."""
    out_dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype)
    is_packed = q.dim() == 3
    shape = (q.shape[1], q.shape[0]) if is_packed else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(shape, dtype=lse_dtype(q.dtype))


def round_up(n: int) -> int:
    """n rounded up as in the shapes of S_dmask and softmax_d."""
    step = _support.ROUND_TO
    return (n + step - 1) // step * step


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return_softmax = args[-1]
    shape = (q.shape[0], q.shape[2], round_up(q.shape[1]), round_up(k.shape[1]))
    s_dmask = q.new_empty(shape if return_softmax else (0,))
    return (*fake_out_and_lse(q, v), s_dmask, q.new_empty(2, dtype=torch.int64))


def _fake_varlen_forward(
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
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = cu_seqlens_q.shape[0] - 1
    shape = (b, q.shape[1], round_up(max_seqlen_q), round_up(max_seqlen_k))
    s_dmask = q.new_empty(shape if return_softmax else (0,))
    return (*fake_out_and_lse(q, v), s_dmask, q.new_empty(2, dtype=torch.int64))


def fake_softmax_d(q: Tensor, cu_seqlens_q: Optional[Tensor]) -> Tensor:
    """Shape of softmax_d: (b, hq, round128(sq)), or (hq, total_q + 128 b) if packed."""
    if cu_seqlens_q is None:
        shape = (q.shape[0], q.shape[2], round_up(q.shape[1]))
    else:
        shape = (q.shape[1], q.shape[0] + _support.ROUND_TO * (cu_seqlens_q.shape[0] - 1))
    return q.new_empty(shape, dtype=lse_dtype(q.dtype))


def _fake_backward(dout: Tensor, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return fake_softmax_d(q, None)


def _fake_varlen_backward(
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
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return fake_softmax_d(q, cu_seqlens_q)


def _fake_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return fake_out_and_lse(q, v_cache)


def attention_flops(
    q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], passes: tuple[int, int]
) -> int:
    """FLOPs of the matrix products of one call, counted as torch counts them: no mask taken off.

    `passes` is the number of products over the head dim of q, k and over that of v: (1, 1)
    forward, (3, 2) backward. Packed shapes (total, h, d) count every pair of rows, an upper bound
    that torch's counter uses too where it can't see the lengths.
    """
    b = q_shape[0] if len(q_shape) == 4 else 1
    pairs = b * q_shape[-3] * k_shape[-3] * q_shape[-2]
    return 2 * pairs * (passes[0] * q_shape[-1] + passes[1] * v_shape[-1])


def varlen_flops(
    q: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, passes: tuple[int, int]
) -> int:
    """FLOPs over the sequences of a packed call; over all pairs of rows for fake tensors."""
    if not isinstance(cu_seqlens_q, torch._subclasses.FakeTensor) and not cu_seqlens_q.is_meta:
        lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
        pairs = q.shape[-2] * sum(sq * sk for sq, sk in lengths)
        return int(2 * pairs * (passes[0] * q.shape[-1] + passes[1] * v.shape[-1]))
    return attention_flops(q.shape, v.shape, v.shape, passes)


def define(
    library: torch.library.Library,
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Optional[Callable[..., Any]] = None,
    draws: bool = False,
) -> None:
    """Define operator `name` for every device type; `draws` says that it uses torch's generator."""
    tags = [torch.Tag.pt2_compliant_tag] if fake is not None else []
    if draws:
        tags.append(torch.Tag.nondeterministic_seeded)
    short_name = name.split("::")[1]
    library.define(short_name + schema, tags=tuple(tags))
    library.impl(short_name, implementation, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(name, fake, lib=library)


_LIBRARY = torch.library.Library("flash_attn", "FRAGMENT")
define(_LIBRARY, FORWARD, SCHEMAS[FORWARD], _forward, _fake_forward, draws=True)
define(
    _LIBRARY,
    VARLEN_FORWARD,
    SCHEMAS[VARLEN_FORWARD],
    _varlen_forward,
    _fake_varlen_forward,
    draws=True,
)
define(_LIBRARY, BACKWARD, SCHEMAS[BACKWARD], _backward, _fake_backward)
define(_LIBRARY, VARLEN_BACKWARD, SCHEMAS[VARLEN_BACKWARD], _varlen_backward, _fake_varlen_backward)
define(_LIBRARY, WITH_KVCACHE, SCHEMAS[WITH_KVCACHE], _with_kvcache, _fake_with_kvcache)


@register_flop_formula(torch.ops.flash_attn._flash_attn_forward)
def _forward_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return attention_flops(q, k, v, (1, 1))


@register_flop_formula(torch.ops.flash_attn._flash_attn_backward)
def _backward_flops(dout: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return attention_flops(q, k, v, (3, 2))


@register_flop_formula(torch.ops.flash_attn._flash_attn_varlen_forward, get_raw=True)
def _varlen_forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return varlen_flops(q, v, cu_seqlens_q, cu_seqlens_k, (1, 1))


@register_flop_formula(torch.ops.flash_attn._flash_attn_varlen_backward, get_raw=True)
def _varlen_backward_flops(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Any,
    dk: Any,
    dv: Any,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    return varlen_flops(q, v, cu_seqlens_q, cu_seqlens_k, (3, 2))


@register_flop_formula(torch.ops.flash_attn._flash_attn_with_kvcache)
def _with_kvcache_flops(q: Any, k_cache: Any, v_cache: Any, *args: Any, **kwargs: Any) -> int:
    return attention_flops(q, k_cache, v_cache, (1, 1))
