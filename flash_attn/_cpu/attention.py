"""Forward and backward of whole calls on the CPU: each piece runs the fastest exact way."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn import _support
from flash_attn._cpu import blockwise
from flash_attn._cpu.append import append_to_cache
from flash_attn._cpu.blockwise import Operands
from flash_attn._cpu.pieces import Piece, cut
from flash_attn._cpu.tables import batch_size
from flash_attn._problem import (
    Backward,
    Descale,
    Forward,
    lse_dtype,
    out_dtype,
    round_up,
    softmax_d_shape,
)


@torch.no_grad()
def forward(call: Forward, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask) of one call; an append has been written to the cache before.

    out like q with head dim dv (bf16 for FP8 inputs); softmax_lse (b, hq, sq) or (hq, total_q);
    s_dmask (b, hq, round128(sq), round128(sk)) if asked for, else (0,).
    """
    if call.append is not None:
        call = append_to_cache(call, name)
    q = call.q
    shape = (*q.shape[:-1], call.v.shape[-1])
    out = q.new_empty(shape, dtype=out_dtype(q.dtype)) if call.out is None else call.out
    lse_shape = (q.shape[-2], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_full(lse_shape, torch.inf, dtype=lse_dtype(q.dtype))
    s_dmask = _empty_s_dmask(call)
    if not call.sequences.is_dense:
        out.zero_()  # rows that belong to no sequence
    for piece in cut(call, name):
        x = _operands(call, piece, call.qv, call.descale)
        if _sdpa_computes(x):
            _sdpa_forward(x, piece.queries(out), piece.lse(lse))
        else:
            blockwise.forward(x, piece.queries(out), piece.lse(lse))
        if call.return_softmax:
            blockwise.signed_softmax(x, s_dmask[piece.start : piece.stop])
    return out, lse, s_dmask


@torch.no_grad()
def backward(call: Backward, name: str) -> Tensor:
    """softmax_d = rowsum(dout * out); dq, dk and dv of the call are written in place.

    softmax_d is float32 (float64 for float64 inputs): (b, hq, round128(sq)), or for packed
    sequences (hq, total_q + 128 b) where sequence i starts at 128 * ((cu_seqlens_q[i] + 128 i) //
    128).
    """
    step, q = _support.ROUND_TO, call.q
    shape = softmax_d_shape(q, batch_size(q, call.sequences))
    softmax_d = q.new_zeros(shape, dtype=call.softmax_lse.dtype)
    if not call.sequences.is_dense:
        for grad in (call.dq, call.dk, call.dv):
            grad.zero_()  # rows that belong to no sequence
    for piece in cut(call, name):
        x = _operands(call, piece, None, Descale())
        dout, out = piece.queries(call.dout), piece.queries(call.out)
        delta = (dout.to(x.dtype) * out.to(x.dtype)).sum(dim=-1).transpose(1, 2)
        if q.dim() == 3:
            at = (piece.rows_q.start + step * piece.start) // step * step
            softmax_d[:, at : at + x.sq] = delta[0]
        else:
            softmax_d[piece.start : piece.stop, :, : x.sq] = delta
        lse = piece.lse(call.softmax_lse)
        grads = piece.queries(call.dq), piece.keys(call.dk), piece.keys(call.dv)
        if _sdpa_computes(x):
            _sdpa_backward(x, dout, out, lse, grads)
        else:
            blockwise.backward(x, dout, delta, lse, *grads)
    return softmax_d


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over parts of the keys: (splits, b, s, h, d) and (splits, b, s, h).

    Parts without keys carry lse -inf or, as the published calls return it, +inf; what stands in
    their out_partial is not read.
    """
    is_empty = lse_partial.isinf()
    lse_partial = lse_partial.masked_fill(is_empty, -torch.inf)
    lse = torch.logsumexp(lse_partial, dim=0)
    weight = torch.exp(lse_partial - lse.masked_fill(lse == -torch.inf, 0.0))
    weighted = out_partial * weight.unsqueeze(-1)
    out = weighted.masked_fill(is_empty.unsqueeze(-1), 0.0).sum(dim=0)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def _operands(
    call: Forward | Backward, piece: Piece, qv: Optional[Tensor], descale: Descale
) -> Operands:
    hq = call.q.shape[-2]
    return Operands(
        q=piece.queries(call.q),
        k=piece.keys(call.k),
        v=piece.keys(call.v),
        heads=torch.arange(piece.start * hq, piece.stop * hq),
        scores=call.scores,
        alibi_slopes=piece.per_sequence(call.scores.alibi_slopes),
        qv=None if qv is None else piece.queries(qv),
        q_descale=piece.per_sequence(descale.q),
        k_descale=piece.per_sequence(descale.k),
        v_descale=piece.per_sequence(descale.v),
    )


def _empty_s_dmask(call: Forward) -> Tensor:
    if not call.return_softmax:
        return call.q.new_empty(0)
    seqs, q, k = call.sequences, call.q, call.k
    sq = q.shape[1] if seqs.max_seqlen_q is None else seqs.max_seqlen_q
    sk = k.shape[1] if seqs.max_seqlen_k is None else seqs.max_seqlen_k
    return q.new_zeros(batch_size(q, seqs), q.shape[-2], round_up(sq), round_up(sk))


def _sdpa_computes(x: Operands) -> bool:
    """Whether torch's own flash kernel for CPUs computes this very thing.

    Its causal mask is aligned to the first key, so it must be square, and it is -inf before the
    scale, which must then be positive.
    """
    mask, scores = x.scores.mask, x.scores
    return (
        (mask.is_full or (mask.is_causal and x.sq == x.sk and scores.softmax_scale > 0))
        and scores.rng_state is None
        and scores.softcap == 0
        and x.alibi_slopes is None
        and x.qv is None
        and x.q.shape[-1] == x.v.shape[-1]
        and x.q.dtype == x.k.dtype != torch.float8_e4m3fn
        and min(x.q.numel(), x.k.numel()) > 0
        # It gives 0 where a score is NaN or inf. A sum that overflows costs speed alone.
        and all(bool(t.sum(dtype=x.dtype).isfinite()) for t in (x.q, x.k))
    )


def _by_group(x: Operands, tensor: Tensor) -> list[Tensor]:
    """Views (B, hk, s, d) of a tensor like q: one for each member of the heads' groups.

    torch's kernel wants as many key heads as query heads; a call for each member of the groups
    gives it that without copies of K and V.
    """
    members = tensor.unflatten(2, (x.num_heads_k, -1)).unbind(3)
    return [member.transpose(1, 2) for member in members]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sdpa_forward(x: Operands, out: Tensor, lse: Tensor) -> None:
    k, v = (_last_contiguous(t).transpose(1, 2) for t in (x.k, x.v))
    is_causal, scale = x.scores.mask.is_causal, x.scores.softmax_scale
    outs = _by_group(x, out)
    lses = lse.unflatten(1, (x.num_heads_k, -1)).unbind(2)
    for q, out_j, lse_j in zip(_by_group(x, _last_contiguous(x.q)), outs, lses):
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, scale=scale
        )
        out_j.copy_(result[0])
        lse_j.copy_(result[1])


def _sdpa_backward(
    x: Operands, dout: Tensor, out: Tensor, lse: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    # In half precision torch's kernel also accumulates in half precision: dv at length 3000 came
    # out 2.7 times as wrong as the plain formula's. Wide inputs avoid that.
    q, k, v, dout, out = (t.to(x.dtype).contiguous() for t in (x.q, x.k, x.v, dout, out))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    is_causal, scale = x.scores.mask.is_causal, x.scores.softmax_scale
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    members = (_by_group(x, t) for t in (q, dout, out, grads[0]))
    lses = lse.unflatten(1, (x.num_heads_k, -1)).unbind(2)
    for q_j, dout_j, out_j, dq_j, lse_j in zip(*members, lses):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_j, q_j, k, v, out_j, lse_j.contiguous(), 0.0, is_causal, scale=scale
        )
        dq_j.copy_(parts[0])
        dk += parts[1]
        dv += parts[2]
    grads[1].copy_(dk.transpose(1, 2))
    grads[2].copy_(dv.transpose(1, 2))
