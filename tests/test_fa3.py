"""The FlashAttention-3 names: their arguments, their returned forms, and what they add."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_problem import CacheProblem
from compare import check, poisoned_memory
from oracle import attention, combine
from problem_types import BF16, FP8, FP16, FP32, FP64, Problem, varlen
from problems import FA3, FA3_KVCACHE
from running import (
    assert_cache_follows_rule,
    assert_follows_rule,
    assert_types,
    oracle_results,
    published_cache_results,
    published_results,
)
from torch import Tensor

import flash_attn_interface as fa3
from flash_attn import _support


def is_differentiable(problem: Problem, device: str) -> bool:
    """FlashAttention-3 has no backward for FP8, attention_chunk and qv, nor GPUs for a wide V."""
    is_wide = device == "cuda" and problem.value_dim > _support.MAX_HEAD_DIM
    return not (problem.dtype == FP8 or problem.attention_chunk or problem.qv or is_wide)


@pytest.mark.parametrize("problem", FA3, ids=str)
def test_output_lse_and_gradients_follow_the_rule(problem: Problem, device: str) -> None:
    tensors = problem.tensors(device)
    backward = is_differentiable(problem, device)
    got = published_results(problem, tensors, fa3, backward=backward)
    assert_types(problem, tensors, got)
    assert_follows_rule(problem, got, backward=backward)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(dtype=BF16, attention_chunk=16),
        Problem(dtype=BF16, d=64, dv=256, qv=True, hk=1),
        varlen((9, 4), (9, 4), dtype=BF16, attention_chunk=3),
    ],
    ids=str,
)
def test_what_has_no_backward_says_so(problem: Problem, device: str) -> None:
    option = "qv" if problem.qv else "attention_chunk"
    with pytest.raises(RuntimeError, match=option):
        published_results(problem, problem.tensors(device), fa3)


def test_unused_rows_and_keys_have_no_effect_and_no_gradient(device: str) -> None:
    problem = varlen(
        (40, 30), (50, 30), used_q=(33, 0), used_k=(20, 30), dtype=BF16, hq=4, hk=2, causal=True
    )
    tensors = problem.tensors(device)
    clean = published_results(problem, tensors, fa3)
    for x, lens, used in zip(
        tensors.leaves,
        (problem.lens_q, *[problem.lens_k] * 2),
        (problem.used_q, *[problem.used_k] * 2),
    ):
        x[used[0] : lens[0]] = 1e4
        x[lens[0] + used[1] :] = 1e4
    got = published_results(problem, tensors, fa3)
    for name, value in clean.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("num_splits", [0, 1, 3, 256])
@pytest.mark.parametrize("pack_gqa", [None, True, False])
def test_scheduling_hints_change_rounding_only(num_splits: int, pack_gqa: Any, device: str) -> None:
    problem = Problem(sq=5, sk=300, hq=4, hk=2, d=64, dtype=BF16, causal=True)
    tensors = problem.tensors(device)
    out, lse = fa3.flash_attn_func(
        *tensors.leaves,
        causal=True,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=2,
        return_attn_probs=True,
    )
    assert_follows_rule(problem, {"out": out, "lse": lse}, backward=False)


def leaving(sm_margin: int, **options: Any) -> Any:
    """FlashAttention-3's names, called with that `sm_margin`."""
    given = {"sm_margin": sm_margin}
    return SimpleNamespace(
        __name__=fa3.__name__,
        flash_attn_func=partial(fa3.flash_attn_func, **given, **options),
        flash_attn_varlen_func=partial(fa3.flash_attn_varlen_func, **given, **options),
        flash_attn_with_kvcache=partial(fa3.flash_attn_with_kvcache, **given),
    )


@pytest.mark.parametrize("sm_margin", [1, 100, 1000])
@pytest.mark.parametrize(
    "problem",
    [
        *(Problem(sq=300, sk=1100, hq=4, hk=2, d=d, dtype=BF16, causal=True) for d in (64, 128)),
        *(Problem(sq=200, sk=500, hq=4, hk=4, d=d, dtype=BF16) for d in (192, 256)),
        varlen((300, 1, 129), (300, 700, 129), dtype=BF16, hq=8, hk=2, d=128),
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_results_follow_the_rule_on_fewer_multiprocessors(
    problem: Problem, sm_margin: int, deterministic: bool, device: str
) -> None:
    tensors = problem.tensors(device)
    module = leaving(sm_margin, deterministic=deterministic)
    assert_follows_rule(problem, published_results(problem, tensors, module))


@pytest.mark.parametrize("sm_margin", [1, 100, 1000])
@pytest.mark.parametrize(
    "problem",
    [
        CacheProblem(b=1, seqlens=(2300,), capacity=2300, hq=8, hk=2, d=128, dtype=BF16),
        CacheProblem(b=5, seqlens=(700, 1, 0, 130, 64), capacity=701, s_new=1, dtype=BF16),
        CacheProblem(b=2, sq=100, seqlens=(700, 40), capacity=800, causal=True, dtype=BF16),
    ],
    ids=str,
)
def test_caches_follow_the_rule_on_fewer_multiprocessors(
    problem: CacheProblem, sm_margin: int, device: str
) -> None:
    got = published_cache_results(problem, device, leaving(sm_margin))
    assert_cache_follows_rule(problem, got)


def test_returned_forms(device: str) -> None:
    problem = Problem(dtype=BF16, hq=4, hk=2)
    tensors = problem.tensors(device)
    out = fa3.flash_attn_func(*tensors.leaves)
    pair = fa3.flash_attn_func(*tensors.leaves, return_attn_probs=True)
    assert torch.equal(out, pair[0])
    assert pair[1].shape == (problem.b, problem.hq, problem.sq)
    assert len(pair) == 2
    packed = varlen((9, 4), hq=4, hk=2, dtype=BF16)
    tensors = packed.tensors(device)
    _, lse = fa3.flash_attn_varlen_func(
        *tensors.leaves, tensors.cu_seqlens_q, tensors.cu_seqlens_k, 9, 9, return_attn_probs=True
    )
    assert lse.shape == (packed.hq, 13)
    tensors = CacheProblem(dtype=BF16).tensors(device)
    out = fa3.flash_attn_with_kvcache(**tensors)
    results = fa3.flash_attn_with_kvcache(**tensors, return_softmax_lse=True)
    assert torch.equal(out, results[0])
    assert results[1].shape == (2, 4, 1)
    assert len(results) == 4


def test_no_gradient_flows_through_the_lse(device: str) -> None:
    leaves = [x.requires_grad_() for x in Problem(dtype=BF16).tensors(device).leaves]
    out, lse = fa3.flash_attn_func(*leaves, return_attn_probs=True)
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize(
    "problem",
    [
        Problem(b=1, sq=5, sk=7, hq=2, hk=1, d=3, dv=5, dtype=FP64, causal=True),
        varlen((3, 4), (5, 4), used_q=(2, 4), used_k=(4, 0), hq=2, hk=2, d=2, dtype=FP64),
        Problem(b=1, sq=5, sk=5, hq=4, hk=2, d=2, dtype=FP64, packing="qkvheads", window=(2, 0)),
    ],
    ids=str,
)
def test_gradients_are_the_derivative_of_the_output(problem: Problem) -> None:
    tensors = problem.tensors()
    leaves = [x.requires_grad_() for x in tensors.leaves]

    def output(*inputs: Tensor) -> Tensor:
        options = {"causal": problem.causal, "window_size": problem.window}
        if problem.packing == "qkvheads":
            return fa3.flash_attn_qkvpacked_func(*inputs, num_heads_q=problem.hq, **options)
        if not problem.is_varlen:
            return fa3.flash_attn_func(*inputs, **options)
        sequences = (tensors.cu_seqlens_q, tensors.cu_seqlens_k, problem.sq, problem.sk)
        used = (tensors.seqused_q, tensors.seqused_k)
        return fa3.flash_attn_varlen_func(*inputs, *sequences, *used, **options)

    assert torch.autograd.gradcheck(output, leaves)


@pytest.mark.parametrize("problem", FA3_KVCACHE, ids=str)
def test_cache_output_lse_and_caches_follow_the_rule(problem: CacheProblem, device: str) -> None:
    got = published_cache_results(problem, device, fa3)
    assert got["out"].dtype == problem.low_dtype
    assert_cache_follows_rule(problem, got)


def test_scheduler_metadata_serves_the_call_it_was_made_for(device: str) -> None:
    problem = CacheProblem(dtype=BF16, sq=2, causal=True)
    tensors = problem.tensors(device)
    metadata = fa3.get_scheduler_metadata(
        problem.b,
        problem.sq,
        problem.capacity,
        problem.hq,
        problem.hk,
        problem.d,
        tensors["cache_seqlens"],
        causal=True,
        num_splits=3,
    )
    assert metadata.dtype == torch.int32
    assert metadata.device.type == device
    out, lse, *_ = fa3.flash_attn_with_kvcache(
        **tensors,
        causal=True,
        num_splits=3,
        scheduler_metadata=metadata,
        return_softmax_lse=True,
    )
    caches = {name: tensors[name] for name in ("k_cache", "v_cache")}
    assert_cache_follows_rule(problem, {"out": out, "lse": lse, **caches})


def partials(device: str) -> tuple[Tensor, Tensor]:
    """Attention over four parts of the keys; the third is empty, and row 0 sees no key at all."""
    problem = Problem(sq=9, sk=40, hq=4, hk=4, dtype=FP32)
    q, k, v = (x.to(device) for x in problem.tensors().leaves)
    outs, lses = [], []
    for keys in (slice(0, 10), slice(10, 11), slice(11, 11), slice(11, 40)):
        out, lse = attention(q.cpu(), k.cpu()[:, keys], v.cpu()[:, keys], dtype=FP32)
        out[:, 0], lse[:, :, 0] = float("nan"), float("-inf")
        outs.append(out)
        lses.append(lse.transpose(1, 2))
    lses[2] = torch.full_like(lses[2], float("-inf"))
    return torch.stack(outs).to(device), torch.stack(lses).to(device)


@pytest.mark.parametrize("dtype", [None, FP32, BF16, FP16])
@pytest.mark.parametrize("preallocated", [False, True])
def test_combine_merges_parts_by_their_lse(dtype: Any, preallocated: bool, device: str) -> None:
    out_partial, lse_partial = partials(device)
    target = dtype or FP32
    given = (
        torch.empty(out_partial.shape[1:], dtype=target, device=device) if preallocated else None
    )
    with poisoned_memory():
        out, lse = fa3.flash_attn_combine(
            out_partial, lse_partial, out=given, out_dtype=None if preallocated else dtype
        )
    assert out.dtype == target
    assert given is None or out.data_ptr() == given.data_ptr()
    clean = out_partial.cpu().nan_to_num(0.0)
    reference = combine(clean, lse_partial.cpu())
    low = combine(clean, lse_partial.cpu(), dtype=FP32)
    check("out", out, reference[0], low[0].to(target))
    check("lse", lse, reference[1], low[1])


@pytest.mark.parametrize("parts", [5, 37])
def test_combine_merges_many_parts_of_few_rows(parts: int, device: str) -> None:
    generator = torch.Generator().manual_seed(parts)
    out_partial = torch.randn(parts, 2, 5, 3, 200, generator=generator)
    lse_partial = 3 * torch.randn(parts, 2, 5, 3, generator=generator)
    clean = out_partial.clone()
    # Some parts of some rows have no keys, and all of one row.
    for empty in ((slice(1, None, 3), slice(None), 2), (slice(None), 0, 4)):
        lse_partial[empty], out_partial[empty], clean[empty] = float("-inf"), float("nan"), 0.0
    out, lse = fa3.flash_attn_combine(out_partial.to(device), lse_partial.to(device))
    reference, low = combine(clean, lse_partial), combine(clean, lse_partial, dtype=FP32)
    check("out", out, reference[0], low[0])
    check("lse", lse, reference[1], low[1])


def test_combine_of_real_splits_is_attention(device: str) -> None:
    problem = Problem(sq=33, sk=90, hq=4, hk=2, dtype=BF16)
    q, k, v = problem.tensors(device).leaves
    parts = [
        fa3.flash_attn_func(q, k[:, keys], v[:, keys], return_attn_probs=True)
        for keys in (slice(0, 40), slice(40, 41), slice(41, 90))
    ]
    out, lse = fa3.flash_attn_combine(
        torch.stack([out.float() for out, _ in parts]),
        torch.stack([lse.transpose(1, 2) for _, lse in parts]),
        out_dtype=BF16,
    )
    runs = [oracle_results(problem, problem.tensors(), t, backward=False) for t in (FP64, BF16)]
    check("out", out, runs[0]["out"], runs[1]["out"])
    check("lse", lse.transpose(1, 2), runs[0]["lse"], runs[1]["lse"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("d", [64, 128, 192])
def test_rows_of_a_batch_that_are_not_in_use(d: int, causal: bool, device: str) -> None:
    """Whatever they hold: out 0, gradients 0, and the others as if they were called alone."""
    make = partial(torch.randn, dtype=BF16, device=device)
    q, dout, k, v = make(3, 150, 4, d), make(3, 150, 4, d), make(3, 200, 2, d), make(3, 200, 2, d)
    lengths = (150, 70, 0), (130, 200, 9)
    for i, (rows, keys) in enumerate(zip(*lengths)):
        q[i, rows:] = dout[i, rows:] = k[i, keys:] = v[i, keys:] = float("nan")
    used = [torch.tensor(x).int().to(device) for x in lengths]
    with poisoned_memory():
        out, lse, *_ = fa3._flash_attn_forward(
            q, k, v, seqused_q=used[0], seqused_k=used[1], causal=causal
        )
        grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
        fa3._flash_attn_backward(
            dout, q, k, v, out, lse, None, None, *used, None, None, *grads, is_causal=causal
        )
    for i, (rows, keys) in enumerate(zip(*lengths)):
        for x, count in ((out, rows), (grads[0], rows), (grads[1], keys), (grads[2], keys)):
            assert not x[i, count:].any()
        assert torch.isposinf(lse[i, :, rows:]).all()
        if rows == 0:
            assert not grads[1][i].any()
            assert not grads[2][i].any()
            continue
        alone = q[i : i + 1, :rows], k[i : i + 1, :keys], v[i : i + 1, :keys]
        runs = []
        for dtype in (FP64, BF16):
            leaves = [x.detach().double().cpu().requires_grad_() for x in alone]
            exact, _ = attention(*leaves, causal=causal, dtype=dtype)
            gradient = dout[i : i + 1, :rows].cpu().to(exact.dtype)
            runs.append([exact.detach(), *torch.autograd.grad(exact, leaves, gradient)])
        counts = (rows, rows, keys, keys)
        for name, x, n, true, low in zip(("out", "dq", "dk", "dv"), (out, *grads), counts, *runs):
            check(f"{name} {i}", x[i : i + 1, :n], true, low.to(BF16))


@pytest.mark.parametrize("sq", [5, 70])
@pytest.mark.parametrize("out_given", [True, False])
def test_the_published_operator_appends_for_the_queries_in_use(
    out_given: bool, sq: int, device: str
) -> None:
    """Each sequence as if it were called alone with the queries that it has."""
    make = partial(torch.randn, dtype=BF16, device=device)
    q, cache, new = make(3, sq, 4, 64), make(2, 3, 90, 2, 64), make(2, 3, 6, 2, 64)
    used_q, used_k = (torch.tensor(x).int().to(device) for x in ((sq, 2, 0), (9, 84, 40)))
    caches = cache.clone()
    given = torch.full_like(q, float("nan")) if out_given else None
    out, lse, *_ = torch.ops.flash_attn_3.fwd(
        q, *caches, *new, out=given, seqused_q=used_q, seqused_k=used_k, is_causal=True
    )
    assert given is None or out.data_ptr() == given.data_ptr()
    expected = cache.clone()
    for i, (rows, keys) in enumerate(zip(used_q.tolist(), used_k.tolist())):
        expected[:, i, keys : keys + 6] = new[:, i]
        assert not out[i, rows:].any()
        assert torch.isposinf(lse[i, :, rows:]).all()
        if rows == 0:
            continue
        alone = q[i : i + 1, :rows], *expected[:, i : i + 1, : keys + 6]
        q_, k_, v_ = (x.double().cpu() for x in alone)
        exact, exact_lse = attention(q_, k_, v_, causal=True)
        low, _ = attention(q_, k_, v_, causal=True, dtype=BF16)
        check(f"out {i}", out[i : i + 1, :rows], exact, low)
        assert torch.allclose(lse[i, :, :rows].cpu().double(), exact_lse[0], atol=1e-2)
    assert torch.equal(caches, expected)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(sq=33, sk=47, hq=4, hk=2, d=64, dtype=BF16, causal=True),
        varlen((9, 30), (20, 17), used_q=(9, 21), used_k=(3, 17), dtype=BF16, window=(8, 2)),
    ],
    ids=str,
)
def test_private_functions_give_what_autograd_gives(problem: Problem, device: str) -> None:
    tensors = problem.tensors(device)
    expected = published_results(problem, tensors, fa3)
    lengths = {
        "cu_seqlens_q": tensors.cu_seqlens_q,
        "cu_seqlens_k": tensors.cu_seqlens_k,
        "max_seqlen_q": problem.sq if problem.is_varlen else None,
        "max_seqlen_k": problem.sk if problem.is_varlen else None,
    }
    window = {"window_size_left": problem.window[0], "window_size_right": problem.window[1]}
    with poisoned_memory():
        out, lse, *_ = fa3._flash_attn_forward(
            *tensors.leaves,
            **lengths,
            **window,
            seqused_q=tensors.seqused_q,
            seqused_k=tensors.seqused_k,
            causal=problem.causal,
        )
        gradients = [torch.empty_like(x) for x in tensors.leaves]
        fa3._flash_attn_backward(
            tensors.dout,
            *tensors.leaves,
            out,
            lse,
            **lengths,
            **window,
            sequed_q=tensors.seqused_q,
            sequed_k=tensors.seqused_k,
            **dict(zip(("dq", "dk", "dv"), gradients)),
            is_causal=problem.causal,
        )
    for name, value in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients)):
        assert torch.equal(value, expected[name]), name
