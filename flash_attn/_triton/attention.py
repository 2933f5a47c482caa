"""Forward and backward of whole calls by the Triton kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flash_attn._problem import Backward, Forward, Scores, Sequences, round_up, softmax_d_shape
from flash_attn._triton.append import append_to_cache, cache_arguments
from flash_attn._triton.backward import delta_kernel, keys_kernel, queries_kernel
from flash_attn._triton.combine import combine_kernel
from flash_attn._triton.forward import forward_kernel
from flash_attn._triton.launch import (
    Config,
    configs,
    launch,
    lse_strides,
    padded,
    row_strides,
    strides,
)
from flash_attn._triton.plan import Plan, batch_size, longest, plan_forward
from flash_attn._triton.s_dmask import s_dmask_kernel

_UNBOUNDED = 1 << 30  # added to a position, it still fits in 32 bits
_DELTA_TILES = (Config(64, 16, 4, 1), Config(16, 16, 4, 1))
_COMBINE_TILES = (Config(16, 16, 4, 1),)
_S_DMASK_TILES = (Config(32, 32, 4, 1),)


@torch.no_grad()
def forward(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask); an append has been written to the cache before."""
    if call.append is not None:
        call = append_to_cache(call)
    q, v, seqs = call.q, call.v, call.sequences
    out = q.new_empty(*q.shape[:-1], v.shape[-1]) if call.out is None else call.out
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(shape, dtype=torch.float32)
    if not seqs.is_dense:  # rows that belong to no sequence
        out.zero_()
        lse.fill_(torch.inf)
    plan = plan_forward(call)
    if plan.num_splits == 1:
        _run_forward(call, plan, out[None], lse[None])
    else:
        outs = out.new_empty((plan.num_splits, *out.shape), dtype=torch.float32)
        lses = lse.new_empty((plan.num_splits, *lse.shape))
        _run_forward(call, plan, outs, lses)
        rows = longest(q, seqs.max_seqlen_q)
        _combine(out, _by_row(lse), outs, _by_row(lses), seqs, batch_size(q, seqs), rows)
    return out, lse, _s_dmask(call)


def _run_forward(call: Forward, plan: Plan, outs: Tensor, lses: Tensor) -> None:
    """Each split's result in its own `outs` and `lses`."""
    q, k, v, seqs = call.q, call.k, call.v, call.sequences
    d, dv = q.shape[-1], v.shape[-1]
    args = {
        "q": q, "k": k, "v": v, "out": outs, "lse": lses,
        **strides("q", q), **strides("k", k), **strides("v", v),
        "out_split": outs.stride(0), **strides("out", outs[0]),
        "lse_split": lses.stride(0), **row_strides("lse", lses[0]),
        **sequence_arguments(q, k, seqs),
        "leftpad_k": seqs.leftpad_k,
        **cache_arguments(call),
        **head_arguments(q, k),
        "num_splits": plan.num_splits,
        "GROUP": plan.group,
        **score_arguments(call.scores),
        **widths(d, dv),
    }  # fmt: skip
    launch(forward_kernel, plan.tiles, "rows", plan.rows, plan.others, q.device, args)


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of parts over the keys, (splits, b, s, h, d) and (splits, b, s, h)."""
    out, lse = torch.empty_like(out_partial[0]), torch.empty_like(lse_partial[0])
    b, s = out.shape[:2]
    _combine(out, lse, out_partial, lse_partial, Sequences(), b, s)
    return out, lse


def _combine(
    out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor, seqs: Sequences, b: int, rows: int
) -> None:
    """The parts `outs` and `lses`, laid out alike, into out and lse (b, s, h) or (total, h)."""
    hq, dv = out.shape[-2:]
    args = {
        "out": out, "lse": lse, "outs": outs, "lses": lses,
        **strides("out", out), **lse_strides("lse", lse),
        "outs_split": outs.stride(0), **strides("outs", outs[0]),
        "lses_split": lses.stride(0), **lse_strides("lses", lses[0]),
        "cu_seqlens_q": seqs.cu_seqlens_q,
        "seqused_q": seqs.seqused_q,
        "room_q": out.shape[-3],
        "hq": hq,
        "num_splits": outs.shape[0],
        "DV": dv,
        "BLOCK_DV": padded(dv),
    }  # fmt: skip
    launch(combine_kernel, _COMBINE_TILES, "rows", rows, hq * b, out.device, args)


def _by_row(lse: Tensor) -> Tensor:
    """A view with heads last."""
    return lse.transpose(-1, -2)


def _s_dmask(call: Forward) -> Tensor:
    """exp(score - maximum of the row), negative where dropped; empty unless asked for."""
    q, k, seqs, scores = call.q, call.k, call.sequences, call.scores
    if not call.return_softmax:
        return q.new_empty(0)
    b, hq, d = batch_size(q, seqs), q.shape[-2], q.shape[-1]
    rows, columns = longest(q, seqs.max_seqlen_q), k.shape[1]
    if seqs.max_seqlen_k is not None:
        columns = seqs.max_seqlen_k
    s_dmask = q.new_zeros(b, hq, round_up(rows), round_up(columns))
    args = {
        "q": q, "k": k, "s_dmask": s_dmask, **strides("q", q), **strides("k", k),
        "s_b": s_dmask.stride(0), "s_h": s_dmask.stride(1), "s_s": s_dmask.stride(2),
        **sequence_arguments(q, k, seqs),
        "leftpad_k": seqs.leftpad_k,
        **cache_arguments(call),
        **head_arguments(q, k),
        **score_arguments(scores),
        "tiny": torch.finfo(q.dtype).tiny,
        "D": d,
        "BLOCK_D": padded(d),
    }  # fmt: skip
    del args["p_scale"], args["IS_CAUSAL"]
    launch(s_dmask_kernel, _S_DMASK_TILES, "rows", rows, hq * b, q.device, args)
    return s_dmask


@torch.no_grad()
def backward(call: Backward) -> Tensor:
    """softmax_d; the call's dq, dk and dv are written in place."""
    q, k, v, seqs = call.q, call.k, call.v, call.sequences
    b, hq, hk, d, dv = batch_size(q, seqs), q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    shape = softmax_d_shape(q, b)
    is_filled = seqs.is_dense and shape[-1] == q.shape[1]
    delta = (q.new_empty if is_filled else q.new_zeros)(shape, dtype=torch.float32)
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
    """Of rows of q and k, and of v, and of their tiles. Where these differ, none is narrower than
    64: Triton 3.6 then reads V wrong, if rows do not start at multiples of 16 bytes.
    """
    block_d, block_dv = padded(d), padded(dv)
    if block_d != block_dv:
        block_d, block_dv = max(block_d, 64), max(block_dv, 64)
    return {"D": d, "DV": dv, "BLOCK_D": block_d, "BLOCK_DV": block_dv}
