"""The rules of calls: one place for every operator and backend, checked before any kernel runs."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from flash_attn import _support
from flash_attn._arguments import check_sm_margin, fail
from flash_attn._problem import (
    Append,
    Backward,
    Forward,
    Scores,
    Sequences,
    lse_dtype,
    out_dtype,
)


def check_forward(name: str, call: Forward) -> None:
    """Every rule on shapes, dtypes, devices and options of a forward call."""
    q, k, v = call.q, call.k, call.v
    is_packed_k = call.sequences.cu_seqlens_k is not None and call.sequences.block_table is None
    _check_dtypes(name, q, k, v, takes_fp8_keys=True)
    check_devices(
        name,
        q=q,
        k=k,
        v=v,
        **_side_tensors(call.sequences, call.scores),
        qv=call.qv,
        q_descale=call.descale.q,
        k_descale=call.descale.k,
        v_descale=call.descale.v,
    )
    _check_shapes(name, q, k, v, call.sequences.cu_seqlens_q is not None, is_packed_k)
    _check_head_dims(name, q, v, "forward")
    _check_sequences(name, q, k, call.sequences)
    _check_scores(name, q, call.scores, call.sequences)
    if call.append is not None:
        _check_append(name, call, call.append)
    if call.return_softmax and call.scores.dropout_p == 0:
        fail(name, "return_softmax is only supported when p_dropout > 0.0", "p_dropout 0.0")
    _check_fa3(name, call)
    if call.out is not None:
        _check_out(name, call.out, q, v)


def _check_out(name: str, out: Tensor, q: Tensor, v: Tensor) -> None:
    if out.dtype != out_dtype(q.dtype):
        fail(name, f"out must have dtype {out_dtype(q.dtype)}", f"{out.dtype}")
    _check_shape(name, "out", out, (*q.shape[:-1], v.shape[-1]), "(like q, dim of v)")
    check_devices(name, q=q, out=out)


def check_backward(name: str, call: Backward) -> None:
    """Every rule on shapes, dtypes, devices and options of a backward call."""
    q, k, v, sequences = call.q, call.k, call.v, call.sequences
    like_q = {"dout": call.dout, "out": call.out}
    grads = {"dq": (call.dq, q), "dk": (call.dk, k), "dv": (call.dv, v)}
    _check_dtypes(name, q, k, v)
    if is_fp8(q):
        fail(name, "FP8 inputs have no backward", f"q of {q.dtype}")
    tensors = {"k": k, "v": v, **like_q, "softmax_lse": call.softmax_lse}
    check_devices(name, q=q, **tensors, **_side_tensors(sequences, call.scores))
    is_packed = sequences.cu_seqlens_q is not None
    _check_shapes(name, q, k, v, is_packed, sequences.cu_seqlens_k is not None)
    _check_head_dims(name, q, v, "backward")
    _check_sequences(name, q, k, sequences)
    _check_scores(name, q, call.scores, sequences)
    check_sm_margin(name, call.sm_margin)
    for argument, x in like_q.items():
        _check_shape(name, argument, x, (*q.shape[:-1], v.shape[-1]), "(like q, dim of v)")
        if x.dtype != q.dtype:
            fail(name, f"query and {argument} must have the same dtype", f"{q.dtype}, {x.dtype}")
    for argument, (grad, x) in grads.items():
        _check_shape(name, argument, grad, tuple(x.shape), f"(like {argument[1]})")
        if grad.dtype != x.dtype or grad.device != x.device:
            fail(
                name,
                f"{argument} must have the dtype and device of {argument[1]}",
                f"{grad.dtype} on {grad.device}, {x.dtype} on {x.device}",
            )
    shape = (q.shape[1], q.shape[0]) if is_packed else (q.shape[0], q.shape[2], q.shape[1])
    _check_shape(name, "softmax_lse", call.softmax_lse, shape, "(b, hq, sq) or (hq, total_q)")
    if call.softmax_lse.dtype != lse_dtype(q.dtype):
        fail(name, f"softmax_lse must have dtype {lse_dtype(q.dtype)}", f"{call.softmax_lse.dtype}")


def _check_dtypes(name: str, q: Tensor, k: Tensor, v: Tensor, takes_fp8_keys: bool = False) -> None:
    """`takes_fp8_keys`: FP8 keys and values go with queries of every dtype."""
    supported = _support.dtypes_of_device(q.device.type)
    dtype = str(q.dtype).replace("torch.", "")
    if dtype not in supported:
        rule = (
            f"FlashAttention on {q.device.type} supports only {', '.join(supported)}"
            if q.device.type == "cpu"
            else "FlashAttention only support fp16 and bf16 data type"
        )
        fail(name, rule, f"q of {q.dtype} on {q.device}")
    if takes_fp8_keys and is_fp8(k):
        if v.dtype != k.dtype:
            fail(name, "key and value must have the same dtype", f"k {k.dtype}, v {v.dtype}")
        return
    for word, argument, x in (("key", "k", k), ("value", "v", v)):
        if x.dtype != q.dtype:
            fail(
                name,
                f"query and {word} must have the same dtype",
                f"q {q.dtype}, {argument} {x.dtype}",
            )


def is_fp8(x: Tensor) -> bool:
    return str(x.dtype) == f"torch.{_support.FP8_DTYPE}"


def _side_tensors(sequences: Sequences, scores: Scores) -> dict[str, Optional[Tensor]]:
    return {
        "cu_seqlens_q": sequences.cu_seqlens_q,
        "cu_seqlens_k": sequences.cu_seqlens_k,
        "seqused_q": sequences.seqused_q,
        "seqused_k": sequences.seqused_k,
        "leftpad_k": sequences.leftpad_k,
        "block_table": sequences.block_table,
        "cache_batch_idx": sequences.kv_batch_idx,
        "alibi_slopes": scores.alibi_slopes,
        "rng_state": scores.rng_state,
    }


def check_devices(name: str, **tensors: Optional[Tensor]) -> None:
    """All tensors are on the device of the first."""
    given = [(argument, x) for argument, x in tensors.items() if x is not None]
    first, device = given[0][0], given[0][1].device
    for argument, x in given:
        if x.device != device:
            fail(name, f"{argument} must be on {device}, the device of {first}", f"{x.device}")


def _check_shape(name: str, argument: str, x: Tensor, shape: tuple[int, ...], words: str) -> None:
    if tuple(x.shape) != shape:
        fail(name, f"{argument} must have shape {words} = {shape}", f"shape {tuple(x.shape)}")


def _check_shapes(
    name: str, q: Tensor, k: Tensor, v: Tensor, is_packed_q: bool, is_packed_k: bool
) -> None:
    for argument, x, is_packed in (
        ("q", q, is_packed_q),
        ("k", k, is_packed_k),
        ("v", v, is_packed_k),
    ):
        lead = "total" if is_packed else "batch_size, seqlen"
        if x.dim() != (3 if is_packed else 4):
            fail(
                name,
                f"{argument} must have shape ({lead}, num_heads, head_size)",
                f"shape {tuple(x.shape)}",
            )
    if not is_packed_q and q.shape[0] == 0:
        fail(name, "batch size must be positive", f"q of shape {tuple(q.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        fail(
            name,
            "v must have the shape of k in all but the last dimension",
            f"k {tuple(k.shape)}, v {tuple(v.shape)}",
        )
    if q.shape[-1] != k.shape[-1]:
        fail(
            name,
            "q and k must have the same head dimension",
            f"q {q.shape[-1]}, k {k.shape[-1]}",
        )
    hq, hk = q.shape[-2], k.shape[-2]
    if hk == 0 or hq % hk != 0:
        fail(
            name,
            "Number of heads in key/value must divide number of heads in query",
            f"q with {hq} heads, k with {hk}",
        )


def _check_head_dims(name: str, q: Tensor, v: Tensor, direction: str) -> None:
    d, dv = q.shape[-1], v.shape[-1]
    is_narrow = d <= _support.NARROW_QK_HEAD_DIM
    limit_v = _support.MAX_HEAD_DIM_V_OF_NARROW_QK if is_narrow else _support.MAX_HEAD_DIM
    if d > _support.MAX_HEAD_DIM or dv > limit_v:
        fail(
            name,
            f"FlashAttention {direction} only supports head dimension at most "
            f"{_support.MAX_HEAD_DIM}",
            f"head dimension {d} of q and k, {dv} of v",
        )
    if d == 0 or dv == 0:
        fail(name, "head dimension must be positive", f"{d} of q and k, {dv} of v", ValueError)


def _check_int32(name: str, argument: str, x: Optional[Tensor], length: int, words: str) -> None:
    if x is None:
        return
    if x.dtype != torch.int32:
        fail(name, f"{argument} must have dtype int32", f"{x.dtype}")
    _check_shape(name, argument, x, (length,), words)


def _check_sequences(name: str, q: Tensor, k: Tensor, seqs: Sequences) -> None:
    for argument, x in (("cu_seqlens_q", seqs.cu_seqlens_q), ("cu_seqlens_k", seqs.cu_seqlens_k)):
        if x is None:
            continue
        if x.dtype != torch.int32:
            fail(name, f"{argument} must have dtype int32", f"{x.dtype}")
        if x.dim() != 1 or x.shape[0] < 2:
            fail(name, f"{argument} must have shape (batch_size + 1)", f"shape {tuple(x.shape)}")
    b = q.shape[0] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.shape[0] - 1
    _check_int32(name, "cu_seqlens_k", seqs.cu_seqlens_k, b + 1, "(batch_size + 1)")
    for argument, x in (
        ("seqused_q", seqs.seqused_q),
        ("seqused_k", seqs.seqused_k),
        ("leftpad_k", seqs.leftpad_k),
        ("cache_batch_idx", seqs.kv_batch_idx),
    ):
        _check_int32(name, argument, x, b, "(batch_size)")
    if seqs.block_table is not None:
        _check_block_table(name, k, seqs, b)
    elif seqs.cu_seqlens_k is None and seqs.kv_batch_idx is None and k.shape[0] != b:
        fail(name, "q and k must have the same batch size", f"q with {b}, k with {k.shape[0]}")


def _check_block_table(name: str, k: Tensor, seqs: Sequences, b: int) -> None:
    table = seqs.block_table
    assert table is not None
    if table.dtype != torch.int32:
        fail(name, "block_table must have dtype torch.int32", f"{table.dtype}")
    if table.dim() != 2 or (seqs.kv_batch_idx is None and table.shape[0] != b):
        fail(
            name,
            f"block_table must have shape (batch_size, max_num_blocks) = ({b}, any)",
            f"shape {tuple(table.shape)}",
        )
    if k.shape[1] == 0:
        fail(name, "Paged KV cache block size must be positive", f"k of shape {tuple(k.shape)}")


def _check_scores(name: str, q: Tensor, scores: Scores, seqs: Sequences) -> None:
    if not 0.0 <= scores.dropout_p < 1.0:
        fail(name, "dropout_p must lie in [0, 1)", f"{scores.dropout_p}", ValueError)
    if not 0.0 <= scores.softcap < math.inf:
        fail(name, "softcap must be 0 (off) or positive", f"{scores.softcap}", ValueError)
    if not math.isfinite(scores.softmax_scale):
        fail(name, "softmax_scale must be finite", f"{scores.softmax_scale}", ValueError)
    if scores.softcap > 0.0 and scores.dropout_p > 0.0:
        fail(
            name,
            "Softcapping does not support dropout for now",
            f"softcap {scores.softcap}, dropout_p {scores.dropout_p}",
        )
    if scores.mask.chunk < 0:
        fail(
            name, "attention_chunk must be 0 (off) or positive", f"{scores.mask.chunk}", ValueError
        )
    slopes = scores.alibi_slopes
    if slopes is not None:
        if slopes.dtype != torch.float32:
            fail(name, "ALiBi slopes must have dtype fp32", f"{slopes.dtype}")
        b = q.shape[0] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.shape[0] - 1
        hq = q.shape[-2]
        if tuple(slopes.shape) not in ((hq,), (b, hq)):
            fail(
                name,
                f"alibi_slopes must have shape (num_heads) = ({hq},) or "
                f"(batch_size, num_heads) = ({b}, {hq})",
                f"shape {tuple(slopes.shape)}",
            )
    rng_state = scores.rng_state
    if scores.dropout_p > 0 and rng_state is None:
        fail(
            name,
            "rng_state of the forward pass must be given when dropout_p > 0",
            "None",
            ValueError,
        )
    if rng_state is not None and (rng_state.dtype != torch.int64 or rng_state.numel() != 2):
        fail(
            name,
            "rng_state must be 2 int64 values",
            f"{rng_state.dtype} of shape {tuple(rng_state.shape)}",
            ValueError,
        )


def _check_append(name: str, call: Forward, append: Append) -> None:
    k, v, seqs = call.k, call.v, call.sequences
    if seqs.cu_seqlens_k is not None:
        fail(name, "new keys go into a cache, so cu_seqlens_k must be None", "a cu_seqlens_k")
    is_packed = append.cu_seqlens is not None
    b = call.q.shape[0] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.shape[0] - 1
    for argument, new, cache in (("k", append.k, k), ("v", append.v, v)):
        if new.dim() != (3 if is_packed else 4):
            rank = "total_k_new" if is_packed else "batch_size, seqlen_new"
            fail(
                name,
                f"{argument} must have shape ({rank}, num_heads_k, head_size)",
                f"shape {tuple(new.shape)}",
            )
        lead = (append.k.shape[0],) if is_packed else (b, append.k.shape[1])
        _check_shape(name, argument, new, (*lead, *cache.shape[2:]), "(of the new rows)")
        if new.dtype != cache.dtype:
            other = "the cache" if is_fp8(cache) else "query"
            fail(
                name,
                f"{argument} must have the same dtype as {other}",
                f"{new.dtype}, {cache.dtype}",
            )
    check_devices(
        name,
        q=call.q,
        k=append.k,
        v=append.v,
        cu_seqlens_k_new=append.cu_seqlens,
        rotary_cos=append.rotary_cos,
        rotary_sin=append.rotary_sin,
        rotary_seqlens=append.rotary_seqlens,
    )
    if seqs.seqused_k is None:
        fail(name, "If key is supplied, seqlens_k must also be passed in", "cache_seqlens None")
    _check_int32(name, "cu_seqlens_k_new", append.cu_seqlens, b + 1, "(batch_size + 1)")
    _check_int32(name, "rotary_seqlens", append.rotary_seqlens, b, "(batch_size)")
    capacity = k.shape[1]
    if seqs.block_table is not None:
        capacity *= seqs.block_table.shape[1]
    if not is_packed and append.k.shape[1] > capacity:
        fail(
            name,
            "If key is supplied, it must have seqlen <= the seqlen of the KV cache",
            f"k with {append.k.shape[1]} rows, a cache of {capacity}",
        )
    _check_rotary(name, call.q, call.k, append)


def _check_rotary(name: str, q: Tensor, k: Tensor, append: Append) -> None:
    cos, sin = append.rotary_cos, append.rotary_sin
    if (cos is None) != (sin is None):
        fail(
            name,
            "rotary_cos and rotary_sin must be given together",
            f"rotary_cos {'None' if cos is None else 'given'}, "
            f"rotary_sin {'None' if sin is None else 'given'}",
        )
    if cos is None or sin is None:
        return
    if is_fp8(k):
        fail(
            name,
            "FP8 keys are not rotated: rotate them, and the queries, before they are scaled",
            f"rotary_cos and k of {k.dtype}",
        )
    for argument, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x.dtype != q.dtype:
            fail(name, f"{argument} must have the same dtype as query", f"{x.dtype}, q {q.dtype}")
    if cos.dim() != 2 or cos.shape != sin.shape:
        fail(
            name,
            "rotary_cos and rotary_sin must have shape (seqlen_ro, rotary_dim / 2)",
            f"shapes {tuple(cos.shape)} and {tuple(sin.shape)}",
        )
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim > q.shape[-1]:
        fail(name, "rotary_dim must be <= headdim", f"{rotary_dim}, headdim {q.shape[-1]}")
    if rotary_dim % 16 != 0:
        fail(
            name,
            "Only rotary dimensions divisible by 16 are currently supported",
            f"rotary_dim {rotary_dim}",
        )


def _check_fa3(name: str, call: Forward) -> None:
    q, v, seqs = call.q, call.v, call.sequences
    b = q.shape[0] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.shape[0] - 1
    if call.qv is not None:
        _check_shape(name, "qv", call.qv, (*q.shape[:-1], v.shape[-1]), "(like q, dim of v)")
        if call.qv.dtype != q.dtype or is_fp8(q):
            fail(name, "qv must have the dtype of q, and not FP8", f"{call.qv.dtype}, q {q.dtype}")
    check_sm_margin(name, call.sm_margin)
    descale = call.descale
    for argument, x, of in (
        ("q_descale", descale.q, q),
        ("k_descale", descale.k, call.k),
        ("v_descale", descale.v, v),
    ):
        if x is None:
            continue
        if not is_fp8(of):
            fail(name, f"{argument} goes with FP8 inputs only", f"{argument[0]} of {of.dtype}")
        if x.dtype != torch.float32:
            fail(name, f"{argument} must have dtype float32", f"{x.dtype}")
        _check_shape(name, argument, x, (b, call.k.shape[-2]), "(batch_size, num_heads_k)")
