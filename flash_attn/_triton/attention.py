"""Forward and backward of whole calls by the Triton kernels."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from flash_attn import _support
from flash_attn._problem import Backward, Forward, Scores, Sequences
from flash_attn._triton.backward import delta_kernel, keys_kernel, queries_kernel
from flash_attn._triton.forward import forward_kernel
from flash_attn._triton.launch import Config, configs, launch, padded, row_strides, strides

_UNBOUNDED = 1 << 30  # added to a position, it still fits in 32 bits
_DELTA_TILES = (Config(64, 16, 4, 1),)


@torch.no_grad()
def forward(call: Forward, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask)."""
    q, v, seqs = call.q, call.v, call.sequences
    out = q.new_empty(*q.shape[:-1], v.shape[-1]) if call.out is None else call.out
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(shape, dtype=torch.float32)
    if not seqs.is_dense:  # rows that belong to no sequence
        out.zero_()
        lse.fill_(torch.inf)
    _run_forward(call, out, lse)
    return out, lse, q.new_empty(0)


def _run_forward(call: Forward, out: Tensor, lse: Tensor) -> None:
    q, k, v, seqs = call.q, call.k, call.v, call.sequences
    b, hq, d, dv = batch_size(q, seqs), q.shape[-2], q.shape[-1], v.shape[-1]
    table = seqs.block_table
    group, num_splits = 1, 1
    args = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse,
        **strides("q", q), **strides("k", k), **strides("v", v),
        "out_split": 0, **strides("out", out), "lse_split": 0, **row_strides("lse", lse),
        **sequence_arguments(q, k, seqs),
        "leftpad_k": seqs.leftpad_k,
        "batch_idx": seqs.kv_batch_idx,
        "rows_of_cache": k.shape[0] if table is None else table.shape[0],
        "table": table,
        "table_b": 0 if table is None else table.stride(0),
        "page_size": 1 if table is None else k.shape[1],
        "num_pages": k.shape[0],
        **head_arguments(q, k),
        "num_splits": num_splits,
        "GROUP": group,
        **score_arguments(call.scores),
        **widths(d, dv),
    }  # fmt: skip
    tiles = configs("forward", d, dv)
    length, others = longest(q, seqs.max_seqlen_q) * group, num_splits * (hq // group) * b
    launch(forward_kernel, tiles, "rows", length, others, q.device, args)


@torch.no_grad()
def backward(call: Backward, name: str) -> Tensor:
    """softmax_d; the call's dq, dk and dv are written in place."""
    q, k, v, seqs = call.q, call.k, call.v, call.sequences
    b, hq, hk, d, dv = batch_size(q, seqs), q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    step, is_packed = _support.ROUND_TO, q.dim() == 3
    shape = (hq, q.shape[0] + step * b) if is_packed else (b, hq, -(-q.shape[1] // step) * step)
    delta = q.new_zeros(shape, dtype=torch.float32)
    if not seqs.is_dense:  # rows that belong to no sequence
        for grad in (call.dq, call.dk, call.dv):
            grad.zero_()
    sequences = sequence_arguments(q, k, seqs)
    rows_q, rows_k = longest(q, seqs.max_seqlen_q), longest(k, seqs.max_seqlen_k)

    of_delta = {
        "dout": call.dout, "out": call.out, "delta": delta,
        **strides("do", call.dout), **strides("out", call.out), **row_strides("delta", delta),
        "cu_seqlens_q": seqs.cu_seqlens_q,
        "seqused_q": seqs.seqused_q,
        "room_q": sequences["room_q"],
        "hq": hq,
        "DV": dv,
        "BLOCK_DV": padded(dv),
    }  # fmt: skip
    launch(delta_kernel, _DELTA_TILES, "rows", rows_q, hq * b, q.device, of_delta)
    shared = {
        "q": q, "k": k, "v": v, "dout": call.dout, "lse": call.softmax_lse, "delta": delta,
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("do", call.dout),
        **row_strides("lse", call.softmax_lse), **row_strides("delta", delta),
        **sequences,
        **head_arguments(q, k),
        **score_arguments(call.scores),
        **widths(d, dv),
    }  # fmt: skip
    of_keys = {"dk": call.dk, "dv": call.dv, **strides("dk", call.dk), **strides("dv", call.dv)}
    tiles = configs("keys", d, dv)
    launch(keys_kernel, tiles, "columns", rows_k, hk * b, q.device, {**shared, **of_keys})
    of_queries = {"dq": call.dq, **strides("dq", call.dq)}
    tiles = configs("queries", d, dv)
    launch(queries_kernel, tiles, "rows", rows_q, hq * b, q.device, {**shared, **of_queries})
    return delta


def batch_size(q: Tensor, seqs: Sequences) -> int:
    return q.shape[0] if seqs.cu_seqlens_q is None else seqs.cu_seqlens_q.shape[0] - 1


def longest(x: Tensor, max_seqlen: Optional[int]) -> int:
    """Bound on the rows of a sequence of q or of k, which is not paged."""
    if x.dim() == 4:
        return x.shape[1]
    return x.shape[0] if max_seqlen is None else min(x.shape[0], max_seqlen)


def sequence_arguments(q: Tensor, k: Tensor, seqs: Sequences) -> dict[str, Any]:
    """Lengths, and the rows that one dense sequence, one paged or a packed tensor has."""
    room_k = k.shape[0] if k.dim() == 3 else k.shape[1]
    if seqs.block_table is not None:
        room_k *= seqs.block_table.shape[1]
    return {
        "cu_seqlens_q": seqs.cu_seqlens_q,
        "cu_seqlens_k": seqs.cu_seqlens_k,
        "seqused_q": seqs.seqused_q,
        "seqused_k": seqs.seqused_k,
        "room_q": q.shape[0] if q.dim() == 3 else q.shape[1],
        "room_k": room_k,
    }


def head_arguments(q: Tensor, k: Tensor) -> dict[str, int]:
    return {"hq": q.shape[-2], "heads_per_key": q.shape[-2] // k.shape[-2]}


def score_arguments(scores: Scores) -> dict[str, Any]:
    mask, slopes = scores.mask, scores.alibi_slopes
    return {
        "left": _UNBOUNDED if mask.left < 0 else mask.left,
        "right": _UNBOUNDED if mask.right < 0 else mask.right,
        "chunk": mask.chunk,
        "scale": scores.softmax_scale,
        "softcap": scores.softcap,
        "slopes": slopes,
        "slopes_b": slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        "rng_state": scores.rng_state,
        "threshold": math.floor((1.0 - scores.dropout_p) * 255.0),
        "p_scale": 1.0 / (1.0 - scores.dropout_p),
        "IS_CAUSAL": mask.right >= 0,
        "IS_LOCAL": mask.left >= 0 or mask.chunk > 0,
        "IS_PLAIN": scores.softmax_scale > 0 and scores.softcap == 0 and slopes is None,
        "HAS_SOFTCAP": scores.softcap > 0,
    }


def widths(d: int, dv: int) -> dict[str, int]:
    return {"D": d, "DV": dv, "BLOCK_D": padded(d), "BLOCK_DV": padded(dv)}
