"""FP8 (e4m3) inputs on a GPU: Hopper's kernels against float64, and what others are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import poisoned_memory
from problem_types import FP8, Problem, varlen
from running import assert_follows_rule, assert_types, published_results
from torch import Tensor

import flash_attn
import flash_attn_interface as fa3
from flash_attn import backends
from flash_attn._problem import Problem as Asked

gpu = pytest.mark.gpu

PLAIN = Problem(sq=200, sk=333, d=128, dtype=FP8, hq=4, hk=2, descale=True)
HEAD_DIMS = (64, 96, 128, 192, 256)
PACKED: dict[str, Any] = {
    "lens_q": (130, 0, 5, 256),
    "lens_k": (130, 50, 300, 257),
    "dtype": FP8,
    "hq": 4,
    "hk": 2,
}
ROWS = [
    *(replace(PLAIN, d=d) for d in HEAD_DIMS),
    *(replace(PLAIN, d=d, causal=True) for d in HEAD_DIMS),
    # Odd head dims, and V's own.
    *(replace(PLAIN, d=d, sq=70) for d in (32, 40, 72, 100, 160, 250)),
    replace(PLAIN, d=192, dv=128),
    replace(PLAIN, d=64, dv=96, descale=False),
    # Sizes at and around blocks; many tiles; one row.
    *(replace(PLAIN, sq=s, sk=k) for s, k in ((1, 1), (64, 128), (128, 129), (257, 96))),
    replace(PLAIN, b=3, sq=700, sk=700, hq=8, hk=8, causal=True),
    replace(PLAIN, sq=300, sk=100, causal=True),
    # From 1024 keys on, with a mask from 2048, head dim 128 takes 224 of them at a time, but 128 of
    # a tile's first ones, where it sees no more.
    *(replace(PLAIN, b=1, sq=260, sk=s) for s in (1024, 1120, 1247, 1248, 1249, 2050)),
    replace(PLAIN, b=1, sq=2100, sk=2100, hq=2, hk=1, causal=True),
    replace(PLAIN, b=1, sq=700, sk=2300, hq=2, hk=1, causal=True),
    replace(PLAIN, b=1, sq=700, sk=2300, hq=2, hk=1, window=(700, 40)),
    varlen((300, 1, 130), (2100, 300, 1150), dtype=FP8, d=128, hq=2, hk=1, causal=True),
    varlen((300, 60), (1500, 1100), used_k=(1131, 1000), dtype=FP8, d=128, hq=2, hk=1),
    # Everything else.
    replace(PLAIN, window=(50, 20)),
    replace(PLAIN, window=(64, -1), causal=True),
    replace(PLAIN, attention_chunk=70),
    *(replace(PLAIN, d=d, softcap=10.0, causal=True) for d in HEAD_DIMS),
    replace(PLAIN, softmax_scale=-0.1),
    replace(PLAIN, softmax_scale=0.5),
    *(varlen(**PACKED, d=d, descale=True, causal=True) for d in HEAD_DIMS),
    varlen(**PACKED, d=128, window=(40, 10)),
    varlen(**PACKED, d=128, used_k=(1, 50, 290, 0), descale=True),
]  # fmt: skip


@gpu
@pytest.mark.parametrize("problem", ROWS, ids=str)
def test_output_and_lse_follow_the_rule(problem: Problem) -> None:
    tensors = problem.tensors("cuda")
    got = published_results(problem, tensors, fa3, backward=False)
    assert_types(problem, tensors, got)
    assert_follows_rule(problem, got, backward=False)


def call(problem: Problem = PLAIN, **options: Any) -> tuple[Tensor, Tensor]:
    tensors = problem.tensors("cuda")
    given = {**tensors.descales, "causal": problem.causal, "return_attn_probs": True, **options}
    result: tuple[Tensor, Tensor] = fa3.flash_attn_func(*tensors.leaves, **given)
    return result


@gpu
@pytest.mark.parametrize(("factor", "rise"), [(8.0, 3.0), (8.0, 30.0), (1.0, 400.0)])
def test_scores_that_rise_from_block_to_block(factor: float, rise: float) -> None:
    problem = replace(PLAIN, sq=150, sk=1500)
    tensors = problem.tensors("cuda")
    q, k, v = (x.float() for x in tensors.leaves)
    q[..., 0] = factor
    k[..., 0] = torch.linspace(rise, -rise, problem.sk, device="cuda")[:, None]
    q, k, v = (x.to(FP8) for x in (q, k, v))
    out, _ = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    wide = [x.double().repeat_interleave(problem.hq // x.shape[2], 2) for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", *wide[:2]) * problem.d**-0.5
    exact = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), wide[2])
    # P in e4m3 makes 0.020 to 0.024 of it. Of the largest product of a score the tensor cores keep
    # 14 bits, and of all others what stands above the last of these.
    assert float((out.double() - exact).norm() / exact.norm()) < 0.04


@gpu
def test_keys_behind_a_sequence_may_hold_anything() -> None:
    problem = varlen(
        (40, 130), (50, 300), used_k=(20, 290), dtype=FP8, d=128, hq=4, hk=2, causal=True
    )
    tensors = problem.tensors("cuda")
    clean = published_results(problem, tensors, fa3, backward=False)
    for x in tensors.leaves[1:]:
        x.view(torch.uint8)[20:50] = 0x7F  # NaN
        x.view(torch.uint8)[340:] = 0x7F
    got = published_results(problem, tensors, fa3, backward=False)
    assert torch.equal(got["out"], clean["out"])
    assert torch.equal(got["lse"], clean["lse"])


@gpu
def test_any_layout_of_inputs_and_descales_gives_the_same_bits() -> None:
    tensors = PLAIN.tensors("cuda")
    expected = call()
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors.leaves]
    # Rows that no copy engine takes: they begin at odd bytes.
    wide = [torch.zeros(*x.shape[:-1], 131, device="cuda").to(FP8) for x in tensors.leaves]
    for x, source in zip(wide, tensors.leaves):
        x[..., :128] = source
    descales = {n: x.t().contiguous().t() for n, x in tensors.descales.items()}
    for leaves in (views, [x[..., :128] for x in wide]):
        got = fa3.flash_attn_func(*leaves, **descales, return_attn_probs=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


@gpu
@pytest.mark.parametrize("length", [512, 2200])
def test_repeats_graphs_and_hints_give_the_same_bits(length: int) -> None:
    problem = replace(PLAIN, b=4, sq=length, sk=length, hq=16, hk=16, causal=True)
    expected = call(problem)
    for options in ({}, {"num_splits": 0}, {"num_splits": 3}, {"pack_gqa": True}):
        with poisoned_memory():
            got = call(problem, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
    tensors = problem.tensors("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fa3.flash_attn_func(*tensors.leaves, **tensors.descales, causal=True)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected[0])


@gpu
def test_a_cache_in_place_of_keys() -> None:
    tensors = PLAIN.tensors("cuda")
    used = torch.tensor([300, 120], dtype=torch.int32, device="cuda")
    out = fa3.flash_attn_with_kvcache(
        *tensors.leaves, cache_seqlens=used, **tensors.descales, causal=True
    )
    for i, length in enumerate(used.tolist()):
        alone = [tensors.leaves[0][i : i + 1]]
        alone += [x[i : i + 1, :length] for x in tensors.leaves[1:]]
        descales = {name: x[i : i + 1] for name, x in tensors.descales.items()}
        assert torch.equal(out[i : i + 1], fa3.flash_attn_func(*alone, **descales, causal=True))


@gpu
def test_many_new_keys_and_queries_over_a_cache() -> None:
    q, k, v = PLAIN.tensors("cuda").leaves
    used = torch.tensor([30, 120], dtype=torch.int32, device="cuda")
    new = [x[:, :100].contiguous() for x in (v, k)]
    caches = [k.clone(), v.clone()]
    out = fa3.flash_attn_with_kvcache(q, *caches, *new, cache_seqlens=used, causal=True)
    for i, length in enumerate(used.tolist()):
        for before, after, rows in zip((k, v), caches, new):
            expected = before[i].clone()
            expected[length : length + 100] = rows[i]
            assert torch.equal(after[i].view(torch.uint8), expected.view(torch.uint8))
    grown = fa3.flash_attn_with_kvcache(q, *caches, cache_seqlens=used + 100, causal=True)
    assert torch.equal(out, grown)


@gpu
def test_what_its_kernels_lack_is_told() -> None:
    q, k, v = PLAIN.tensors("cuda").leaves
    lens = torch.tensor([3, 4], dtype=torch.int32, device="cuda")
    table = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    rows = "at most 64 rows of queries, here 200 queries times 2 heads"
    with pytest.raises(RuntimeError, match=f"a page_table go with {rows}"):
        fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, page_table=table)
    with pytest.raises(RuntimeError, match=f"queries of 16 bits go with {rows}"):
        fa3.flash_attn_with_kvcache(q.bfloat16(), k, v, cache_seqlens=lens)
    out = flash_attn.flash_attn_func(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="FP8 inputs have no backward"):
        out.backward(torch.ones_like(out))


def asked(*features: str, capability: tuple[int, int] = (9, 0)) -> Asked:
    return Asked("cuda", "float8_e4m3fn", 128, 128, frozenset({"fp8", *features}), capability)


def test_dispatch_tells_what_fp8_lacks_on_a_gpu() -> None:
    told = dict(backends.explain(asked("dropout", "causal")))
    assert "lacks dropout with FP8 inputs" in told["cuda"]
    assert "lacks fp8" in told["triton"]
