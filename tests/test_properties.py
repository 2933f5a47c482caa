"""Identities that attention must satisfy, on drawn shapes, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from compare import TINY
from hypothesis import given
from hypothesis import strategies as st
from problem_types import FP64, Problem
from running import published_results
from torch import Tensor

import flash_attn
import flash_attn_interface as fa3
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Problem:
    """A small dense float64 problem; lengths straddle powers of two and may leave rows blind."""
    lengths = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 65, 127, 129]))
    hk = draw(st.integers(1, 3))
    bounds = st.one_of(st.just(-1), st.integers(0, 40))
    row = Problem(
        b=draw(st.integers(1, 3)),
        sq=draw(lengths),
        sk=draw(lengths),
        hq=hk * draw(st.integers(1, 3)),
        hk=hk,
        d=draw(st.integers(1, 20)),
        dtype=FP64,
        causal=draw(st.booleans()),
        window=(draw(bounds), draw(bounds)),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        alibi=draw(st.sampled_from(["", "h", "bh"])),
    )
    return replace(row, **fixed)


def same(got: Tensor, expected: Tensor, terms: int = 1) -> None:
    """Equal but for the rounding of sums of `terms` values that reached past 1."""
    scale = max(1.0, float(expected.abs().nan_to_num(posinf=0.0).max())) if expected.numel() else 1
    torch.testing.assert_close(got, expected, rtol=0, atol=TINY[FP64] * scale * terms)


def options(problem: Problem, slopes: Any) -> dict[str, Any]:
    return {
        "causal": problem.causal,
        "window_size": problem.window,
        "softcap": problem.softcap,
        "alibi_slopes": slopes,
    }


def run(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, slopes: Any = None, **more: Any
) -> tuple:
    """out and lse of the published function."""
    chosen = {**options(problem, slopes), **more}
    return flash_attn_func(q, k, v, return_attn_probs=True, **chosen)[:2]


@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_everything(problem: Problem, random: Any) -> None:
    order = random.sample(range(problem.b), problem.b)
    tensors = problem.tensors()
    whole = published_results(problem, tensors, flash_attn)
    slopes = tensors.alibi_slopes
    moved = replace(
        tensors,
        leaves=tuple(x[order] for x in tensors.leaves),
        dout=tensors.dout[order],
        alibi_slopes=slopes[order] if problem.alibi == "bh" else slopes,
    )
    for name, value in published_results(problem, moved, flash_attn).items():
        if name != "S_dmask":
            same(value, whole[name][order])


@given(problems(alibi=""))
def test_grouped_heads_equal_repeated_heads(problem: Problem) -> None:
    tensors = problem.tensors()
    group = problem.hq // problem.hk
    grouped = published_results(problem, tensors, flash_attn)
    q, *kv = tensors.leaves
    full = replace(tensors, leaves=(q, *(x.repeat_interleave(group, dim=2) for x in kv)))
    repeated = published_results(replace(problem, hk=problem.hq), full, flash_attn)
    for name in ("out", "lse", "dq"):
        same(grouped[name], repeated[name])
    for name in ("dk", "dv"):
        same(grouped[name], repeated[name].unflatten(2, (problem.hk, group)).sum(3), terms=group)


@given(problems(window=(-1, -1)))
def test_causal_is_a_window_without_a_right_side(problem: Problem) -> None:
    tensors = problem.tensors()
    causal = published_results(replace(problem, causal=True), tensors, flash_attn)
    window = published_results(replace(problem, causal=False, window=(-1, 0)), tensors, flash_attn)
    assert all(torch.equal(causal[name], window[name]) for name in causal)


@given(problems(causal=True))
def test_causal_forces_the_right_side_to_zero(problem: Problem) -> None:
    tensors = problem.tensors()
    forced = replace(problem, window=(problem.window[0], 0))
    got = published_results(problem, tensors, flash_attn)
    want = published_results(forced, tensors, flash_attn)
    assert all(torch.equal(got[name], want[name]) for name in got)


@given(problems(), st.integers(0, 5))
def test_a_window_as_wide_as_the_keys_is_no_window(problem: Problem, margin: int) -> None:
    tensors = problem.tensors()
    wide = max(problem.sq, problem.sk) + margin
    unbounded = published_results(replace(problem, window=(-1, -1)), tensors, flash_attn)
    bounded = published_results(replace(problem, window=(wide, wide)), tensors, flash_attn)
    for name, value in unbounded.items():
        same(bounded[name], value)


@given(problems(causal=False, window=(-1, -1), alibi=""), st.lists(st.integers(0, 129), max_size=4))
def test_parts_of_the_keys_combine_by_lse(problem: Problem, cuts: list[int]) -> None:
    q, k, v = problem.tensors().leaves
    edges = sorted({0, problem.sk, *(min(cut, problem.sk) for cut in cuts)})
    edges = [0, *edges]
    parts = [run(problem, q, k[:, a:z], v[:, a:z]) for a, z in zip(edges, edges[1:])]
    lses = torch.stack([lse for _, lse in parts])
    weights = torch.exp(torch.where(lses.isinf(), -torch.inf, lses))
    merged = sum(w.transpose(1, 2)[..., None] * out for w, (out, _) in zip(weights, parts))
    out, lse = run(problem, q, k, v)
    total = weights.sum(0)
    same(merged / total.transpose(1, 2)[..., None], out, terms=len(parts))
    same(total.log(), lse, terms=len(parts))
    combined_out, combined_lse = fa3.flash_attn_combine(
        torch.stack([out for out, _ in parts]).float(), lses.transpose(2, 3).float()
    )
    torch.testing.assert_close(combined_out, out.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(combined_lse, lse.transpose(1, 2).float(), rtol=0, atol=1e-5)


@given(problems())
def test_packed_sequences_equal_each_sequence_alone(problem: Problem) -> None:
    tensors = problem.tensors()
    generator = torch.Generator().manual_seed(problem.sq)
    lens_q = torch.randint(0, problem.sq + 1, (problem.b,), generator=generator).tolist()
    lens_k = torch.randint(0, problem.sk + 1, (problem.b,), generator=generator).tolist()
    starts = [
        torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
        for lens in (lens_q, lens_k)
    ]
    q, k, v = tensors.leaves
    packed = [torch.cat([x[i, : lens_q[i]] for i in range(problem.b)]) for x in (q,)] + [
        torch.cat([x[i, : lens_k[i]] for i in range(problem.b)]) for x in (k, v)
    ]
    slopes = tensors.alibi_slopes
    out, lse, _ = flash_attn_varlen_func(
        *packed,
        *starts,
        problem.sq,
        problem.sk,
        return_attn_probs=True,
        **options(problem, slopes),
    )
    for i in range(problem.b):
        rows = slice(int(starts[0][i]), int(starts[0][i + 1]))
        alone = run(
            problem,
            q[i : i + 1, : lens_q[i]],
            k[i : i + 1, : lens_k[i]],
            v[i : i + 1, : lens_k[i]],
            slopes[i] if problem.alibi == "bh" else slopes,
        )
        same(out[rows], alone[0][0])
        same(lse[:, rows], alone[1][0])


@given(problems(softcap=0.0))
def test_a_vector_added_to_every_key_moves_only_the_lse(problem: Problem) -> None:
    tensors = problem.tensors()
    q, k, v = tensors.leaves
    slopes = tensors.alibi_slopes
    shift = k[:, :1].roll(1, dims=-1)
    out, lse = run(problem, q, k, v, slopes)
    moved_out, moved_lse = run(problem, q, k + shift, v, slopes)
    shift = shift.repeat_interleave(problem.hq // problem.hk, dim=2)
    moved_by = (q * shift).sum(-1).transpose(1, 2) * problem.d**-0.5
    same(moved_out, out, terms=8)
    same(moved_lse, lse + moved_by, terms=8)


@given(problems(softcap=0.0))
def test_key_gradients_of_every_head_sum_to_zero(problem: Problem) -> None:
    dk = published_results(problem, problem.tensors(), flash_attn)["dk"]
    same(dk.sum(1), torch.zeros_like(dk[:, 0]), terms=problem.sk)


@given(problems())
def test_outputs_lie_within_the_values_and_are_linear_in_them(problem: Problem) -> None:
    tensors = problem.tensors()
    q, k, v = tensors.leaves
    slopes = tensors.alibi_slopes
    out, lse = run(problem, q, k, v, slopes)
    spread = v.repeat_interleave(problem.hq // problem.hk, dim=2)
    low, high = spread.amin(1, keepdim=True), spread.amax(1, keepdim=True)
    inside = (out >= low - 1e-12) & (out <= high + 1e-12)
    blind = lse.transpose(1, 2)[..., None].isinf()
    assert (inside | blind).all()
    assert (out[blind.expand_as(out)] == 0).all()
    other = v.flip(1)
    together, _ = run(problem, q, k, v - 3 * other, slopes)
    same(together, out - 3 * run(problem, q, k, other, slopes)[0], terms=4)


@given(problems(), st.floats(0.1, 8.0))
def test_a_factor_may_stand_in_q_or_in_the_scale(problem: Problem, factor: float) -> None:
    tensors = problem.tensors()
    q, k, v = tensors.leaves
    scaled = run(problem, q * factor, k, v, tensors.alibi_slopes, softmax_scale=0.3)
    named = run(problem, q, k, v, tensors.alibi_slopes, softmax_scale=0.3 * factor)
    for got, want in zip(scaled, named):
        same(got, want, terms=8)


@given(problems(hq=2, hk=2, softcap=0.0))
def test_packed_inputs_equal_separate_ones(problem: Problem) -> None:
    problem = replace(problem, sk=problem.sq)
    tensors = problem.tensors()
    separate = published_results(problem, tensors, flash_attn)
    for packing in ("kv", "qkv"):
        packed = replace(problem, packing=packing)
        inputs = replace(tensors, leaves=packed.pack(*tensors.leaves))
        got = published_results(packed, inputs, flash_attn)
        gradients = [got[f"d{name}"] for name in ({"kv": ("q", "kv"), "qkv": ("qkv",)}[packing])]
        same(got["out"], separate["out"])
        for name, value in zip(("dq", "dk", "dv"), packed.split(gradients)):
            same(value, separate[name])


@given(problems(b=2, causal=True, window=(-1, -1)), st.integers(0, 129), st.integers(1, 9))
def test_an_appended_cache_equals_the_whole_sequence(
    problem: Problem, before: int, new: int
) -> None:
    new = min(new, problem.sk)
    before = min(before, problem.sk - new)
    q, k, v = problem.tensors().leaves
    slopes = problem.tensors().alibi_slopes
    caches = [torch.full_like(x, float("nan")) for x in (k, v)]
    for cache, x in zip(caches, (k, v)):
        cache[:, :before] = x[:, :before]
    appended = slice(before, before + new)
    out, lse = flash_attn_with_kvcache(
        q,
        *caches,
        k[:, appended],
        v[:, appended],
        cache_seqlens=before,
        return_softmax_lse=True,
        **options(problem, slopes),
    )
    whole = run(problem, q, k[:, : before + new], v[:, : before + new], slopes)
    same(out, whole[0])
    same(lse, whole[1])
