"""Calls as ring-flash-attn, yunchang, xformers and TransformerEngine make them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check
from consumers import FP32, PRIVATE, SCALE, agrees, dense, gradients_agree, starts_of, tensors
from oracle import attention, varlen_attention
from torch import Tensor

import flash_attn_interface as fa3
from flash_attn import flash_attn_interface as fa2

# --- ring-flash-attn, yunchang ------------------------------------------------------------------


def default_arguments(function: Any) -> dict[str, Any]:
    """As ring-flash-attn reads a function's argument names, None where there is no default."""
    if not inspect.isfunction(function):
        function = function._init_fn
    spec = inspect.getfullargspec(function)
    defaults = spec.defaults or ()
    values = (None,) * (len(spec.args) - len(defaults)) + defaults
    return {**dict(zip(spec.args, values)), "softcap": 0.0}


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize("module", [fa2, fa3], ids=["fa2", "fa3"])
def test_private_names_are_functions_or_custom_ops(module: Any, name: str) -> None:
    function = getattr(module, name, None)
    if module is fa3 and "varlen" in name:
        assert function is None
        return
    assert inspect.isfunction(function) or hasattr(function, "_init_fn")


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Ring attention's running merge of (out, lse) over chunks of the keys."""
    (out, lse), *others = parts
    out, lse = out.to(FP32), lse.transpose(-2, -1).unsqueeze(-1)
    for block_out, block_lse in others:
        block_lse = block_lse.transpose(-2, -1).unsqueeze(-1)
        out = out - F.sigmoid(block_lse - lse) * (out - block_out)
        lse = lse - F.logsigmoid(lse - block_lse)
    return out, lse.squeeze(-1).transpose(-2, -1)


@pytest.mark.parametrize("causal", [False, True])
def test_ring_of_two_chunks_equals_attention_over_all_keys(causal: bool) -> None:
    """The second rank of two: its own keys under the mask, the first rank's keys in full."""
    q, k, v = dense()
    k_first, v_first = tensors((2, 12, 2, 16), (2, 12, 2, 16), seed=1)
    rule = {"softmax_scale": SCALE, "alibi_slopes": None}
    window = {"window_size_left": -1, "window_size_right": -1}
    parts = []
    for step, (k_step, v_step) in enumerate(((k, v), (k_first, v_first))):
        params = default_arguments(fa2._flash_attn_forward)
        params.update(
            q=q,
            k=k_step,
            v=v_step,
            dropout_p=0,
            causal=causal and step == 0,
            return_softmax=False,
            **rule,
            **window,
        )
        outputs = fa2._flash_attn_forward(**params)
        assert len(outputs) == 4
        parts.append(outputs[:2])
    out, lse = merged(parts)
    all_k, all_v = torch.cat((k_first, k), dim=1), torch.cat((v_first, v), dim=1)
    options = {"softmax_scale": SCALE, "causal": causal}
    runs = [attention(q, all_k, all_v, **options, dtype=dtype) for dtype in (torch.float64, FP32)]
    check("out", out, runs[0][0], runs[1][0])
    check("lse", lse, runs[0][1], runs[1][1])

    dout = torch.ones_like(q)
    dq = torch.zeros_like(q)
    key_grads = []
    buffers = [torch.empty_like(x) for x in (q, k, v)]
    for step, (k_step, v_step) in enumerate(((k, v), (k_first, v_first))):
        params = default_arguments(fa2._flash_attn_backward)
        params.update(
            dout=dout,
            q=q,
            k=k_step,
            v=v_step,
            out=out,
            softmax_lse=lse,
            **dict(zip(("dq", "dk", "dv"), buffers)),
            dropout_p=0,
            causal=causal and step == 0,
            deterministic=False,
            **rule,
            **window,
        )
        fa2._flash_attn_backward(**params)
        dq += buffers[0]
        key_grads.append([x.clone() for x in buffers[1:]])
    dk, dv = (torch.cat((first, own), dim=1) for own, first in zip(*key_grads))
    gradients_agree([dq, dk, dv], dout, [q, all_k, all_v], **options)


def test_ring_varlen_by_keyword() -> None:
    q, k, v = (x.flatten(0, 1) for x in dense())
    cu_seqlens = starts_of(5, 19)
    params = default_arguments(fa2._flash_attn_varlen_forward)
    params.update(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=19,
        max_seqlen_k=19,
        dropout_p=0,
        softmax_scale=SCALE,
        causal=True,
        alibi_slopes=None,
        return_softmax=False,
    )
    out, lse, _, rng_state = fa2._flash_attn_varlen_forward(**params)
    assert lse.shape == (4, 24)
    agrees(out, varlen_attention, q, k, v, cu_seqlens, cu_seqlens, softmax_scale=SCALE, causal=True)
    # llama3's ring writes the gradients of keys into a slice of a larger buffer.
    buffer = torch.full((2, 40, 2, 16), float("nan"))
    grads = (torch.empty_like(q), buffer[0, 8:32], buffer[1, 8:32])
    params = default_arguments(fa2._flash_attn_varlen_backward)
    params.update(
        dout=torch.ones_like(out),
        q=q,
        k=k,
        v=v,
        out=out,
        softmax_lse=lse,
        **dict(zip(("dq", "dk", "dv"), grads)),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=19,
        max_seqlen_k=19,
        dropout_p=0,
        softmax_scale=SCALE,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        alibi_slopes=None,
        deterministic=True,
        rng_state=rng_state,
    )
    fa2._flash_attn_varlen_backward(**params)
    assert not any(grad.isnan().any() for grad in grads)
    assert buffer[:, :8].isnan().all()
    assert buffer[:, 32:].isnan().all()


def test_yunchang_by_keyword_and_by_position() -> None:
    q, k, v = dense()
    out, lse, _, _ = fa2._flash_attn_forward(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=SCALE,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    grads = [torch.empty_like(x) for x in (q, k, v)]
    dout = torch.ones_like(out)
    tail = (0.0, SCALE, True, -1, -1, 0.0, None, False, None)
    fa2._flash_attn_backward(dout, q, k, v, out, lse, *grads, *tail)
    gradients_agree(grads, dout, [q, k, v], softmax_scale=SCALE, causal=True)


# --- xformers -----------------------------------------------------------------------------------


def strided_gradients(q: Tensor, k: Tensor) -> list[Tensor]:
    """Views of one chunk, as xformers makes them so that no copy joins them later."""
    chunk = torch.full((*q.shape[:-2], q.shape[-2] + 2 * k.shape[-2], q.shape[-1]), float("nan"))
    return list(chunk.split((q.shape[-2], k.shape[-2], k.shape[-2]), dim=-2))


def test_xformers_dense_by_position() -> None:
    extension = fa2.flash_attn_gpu
    q, k, v = dense()
    out, lse, _, rng_state = extension.fwd(
        q, k, v, None, None, 0.0, SCALE, True, 3, 0, 0.0, False, None
    )
    options = {"softmax_scale": SCALE, "causal": True, "window": (3, 0)}
    agrees(out, attention, q, k, v, **options)
    grads = strided_gradients(q, k)
    dout = torch.ones_like(out)
    extension.bwd(
        dout, q, k, v, out, lse, *grads, None, 0.0, SCALE, True, 3, 0, 0.0, False, None, rng_state
    )
    gradients_agree(grads, dout, [q, k, v], **options)


def test_xformers_varlen_by_position() -> None:
    extension = fa2.flash_attn_gpu
    q, k, v = (x.flatten(0, 1) for x in dense())
    cu = starts_of(10, 14)
    tail = (0.0, SCALE, False, True, -1, -1, 0.0)
    out, lse, _, rng_state = extension.varlen_fwd(
        q, k, v, None, cu, cu, None, None, None, None, 14, 14, *tail, False, None
    )
    agrees(out, varlen_attention, q, k, v, cu, cu, softmax_scale=SCALE, causal=True)
    grads = strided_gradients(q, k)
    dout = torch.ones_like(out)
    extension.varlen_bwd(
        dout, q, k, v, out, lse, *grads, cu, cu, None, 14, 14, *tail, False, None, rng_state
    )
    for i, (start, stop) in enumerate(((0, 10), (10, 24))):
        rows = slice(start, stop)
        parts = [x[rows][None] for x in grads]
        inputs = [x[rows][None] for x in (q, k, v)]
        assert not parts[i].isnan().any()
        gradients_agree(parts, dout[rows][None], inputs, softmax_scale=SCALE, causal=True)


# seqstart_k, seqused_k: padded blocks; blocks with gaps; blocks that lie anywhere.
XFORMERS_KEYS = [
    ("padded", [0, 8, 16, 24], [5, 8, 1]),
    ("gaps", [0, 7, 12, 24], [6, 3, 1]),
    ("late_start", [3, 10, 16, 24], [6, 3, 8]),
    ("any_order", [16, 3, 10, 24], [8, 6, 3]),
]


@pytest.mark.parametrize(
    ("starts", "used"), [row[1:] for row in XFORMERS_KEYS], ids=[row[0] for row in XFORMERS_KEYS]
)
def test_xformers_keys_in_blocks(starts: list[int], used: list[int]) -> None:
    q, k, v = (x.flatten(0, 1) for x in dense())
    q, cu_q = q[:6], starts_of(1, 1, 4)
    cu_k, seqused = (torch.tensor(x, dtype=torch.int32) for x in (starts, used))
    out, *_ = fa2.flash_attn_gpu.varlen_fwd(
        q, k, v, None, cu_q, cu_k, seqused, None, None, None, 4, 8,
        0.0, SCALE, False, True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    keys = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, used)])
    agrees(
        out,
        varlen_attention,
        q,
        k[keys],
        v[keys],
        cu_q,
        starts_of(*used),
        softmax_scale=SCALE,
        causal=True,
    )


def test_xformers_pages_with_offsets_for_starts() -> None:
    """Paged masks: the starts are offsets with -1 at the end, and only `seqused_k` counts."""
    q, k, v = tensors((3, 4, 16), (6, 8, 2, 16), (6, 8, 2, 16))
    table = torch.tensor([[5, 1], [0, 0], [2, 4]], dtype=torch.int32)
    used = torch.tensor([9, 3, 16], dtype=torch.int32)
    out, *_ = fa2.flash_attn_gpu.varlen_fwd(
        q, k, v, None, starts_of(1, 1, 1), torch.tensor([0, 0, 0, -1], dtype=torch.int32), used,
        None, table, None, 1, 16, 0.0, SCALE, False, True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    keys, values = (
        torch.cat([x[table[i].long()].flatten(0, 1)[:n] for i, n in enumerate(used.tolist())])
        for x in (k, v)
    )
    agrees(
        out,
        varlen_attention,
        q,
        keys,
        values,
        starts_of(1, 1, 1),
        starts_of(*used.tolist()),
        softmax_scale=SCALE,
        causal=True,
    )


# --- TransformerEngine --------------------------------------------------------------------------


@pytest.mark.parametrize("is_varlen", [False, True], ids=["bshd", "thd"])
def test_transformer_engine_context_parallel_calls(is_varlen: bool) -> None:
    q, k, v = dense()
    lengths: tuple[Any, ...] = ()
    forward, backward = fa2._flash_attn_forward, fa2._flash_attn_backward
    more: dict[str, Any] = {}
    if is_varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu = starts_of(12, 12)
        lengths, more = (cu, cu, 12, 12), {"block_table": None}
        forward, backward = fa2._flash_attn_varlen_forward, fa2._flash_attn_varlen_backward
    shared = {
        "softmax_scale": SCALE,
        "causal": True,
        "window_size_left": -1,
        "window_size_right": 0,
        "dropout_p": 0.0,
        "alibi_slopes": None,
        "softcap": 0.0,
    }
    outputs = forward(q, k, v, *lengths, return_softmax=False, **shared, **more)
    out, lse, rng_state = outputs[0], outputs[1], outputs[3]
    grads = [torch.empty_like(x) for x in (q, k, v)]
    dout = torch.ones_like(out)
    backward(
        dout, q, k, v, out, lse, *grads, *lengths,
        deterministic=False, rng_state=rng_state, **shared,
    )  # fmt: skip
    if is_varlen:
        assert lse.shape == (4, 24)
        dout, q, k, v, *grads = (x.unflatten(0, (2, 12)) for x in (dout, q, k, v, *grads))
    gradients_agree(grads, dout, [q, k, v], softmax_scale=SCALE, causal=True)


def test_transformer_engine_public_calls() -> None:
    q, k, v = dense()
    options = {
        "softmax_scale": SCALE,
        "causal": True,
        "window_size": (-1, 0),
        "alibi_slopes": None,
        "deterministic": True,
    }
    out = fa2.flash_attn_func(q, k, v, 0.0, **options)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    cu = starts_of(12, 12)
    packed = fa2.flash_attn_varlen_func(*flat, cu, cu, 12, 12, 0.0, **options, block_table=None)
    assert torch.equal(packed.unflatten(0, (2, 12)), out)


def test_transformer_engine_fa3_calls() -> None:
    q, k, v = dense()
    options = {"softmax_scale": SCALE, "causal": True, "window_size_left": -1}
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, *[None] * 20, **options, window_size_right=0)
    agrees(out, attention, q, k, v, softmax_scale=SCALE, causal=True)
    grads = dict(zip(("dq", "dk", "dv"), (torch.empty_like(x) for x in (q, k, v))))
    fa3._flash_attn_backward(
        torch.ones_like(out),
        q,
        k,
        v,
        out,
        lse,
        **grads,
        softmax_scale=SCALE,
        is_causal=True,
        window_size_left=-1,
        window_size_right=0,
        deterministic=False,
    )
    dout = torch.ones_like(out)
    gradients_agree([*grads.values()], dout, [q, k, v], softmax_scale=SCALE, causal=True)
