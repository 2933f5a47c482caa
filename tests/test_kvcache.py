"""Attention over a KV cache: append, rotary, pages, left padding, splits."""

from __future__ import annotations

import pytest
import torch
from cache_problem import CacheProblem
from compare import check
from problem_types import BF16, FP64, Problem
from problems import KVCACHE
from running import assert_cache_follows_rule, oracle_results, published_cache_results

import flash_attn


@pytest.mark.parametrize("problem", KVCACHE, ids=str)
def test_output_lse_and_caches_follow_the_rule(problem: CacheProblem, device: str) -> None:
    got = published_cache_results(problem, device, flash_attn)
    assert got["out"].dtype == problem.dtype
    assert_cache_follows_rule(problem, got)


def test_output_alone_is_the_same_output(device: str) -> None:
    problem = CacheProblem(dtype=BF16, sq=3, causal=True)
    tensors = problem.tensors(device)
    alone = flash_attn.flash_attn_with_kvcache(**tensors, causal=True)
    out, lse = flash_attn.flash_attn_with_kvcache(**tensors, causal=True, return_softmax_lse=True)
    assert torch.equal(alone, out)
    assert lse.shape == (problem.b, problem.hq, problem.sq)
    assert lse.dtype == torch.float32


def test_the_append_writes_only_its_own_slots(device: str) -> None:
    problem = CacheProblem(dtype=BF16, s_new=3)
    tensors = problem.tensors(device)
    for name in ("k_cache", "v_cache"):
        tensors[name].nan_to_num_(7.0)
    before = tensors["k_cache"].clone()
    flash_attn.flash_attn_with_kvcache(**tensors)
    changed = (tensors["k_cache"] != before).flatten(2).any(-1).cpu()
    expected = torch.zeros(problem.b, problem.capacity, dtype=torch.bool)
    for i, length in enumerate(problem.seqlens):
        expected[i, length : length + 3] = True
    assert torch.equal(changed, expected)


def test_new_rows_may_be_rows_of_the_cache(device: str) -> None:
    problem = CacheProblem(dtype=BF16, seqlens=(2, 0), s_new=1)
    tensors = problem.tensors(device)
    for name in ("k_cache", "v_cache"):
        tensors[name].nan_to_num_(7.0)
    rows = {name: tensors[f"{name}_cache"][:, :1] for name in ("k", "v")}
    copies = {name: x.clone() for name, x in {**tensors, **rows}.items() if x is not None}
    expected = flash_attn.flash_attn_with_kvcache(**{**tensors, **copies})
    assert torch.equal(flash_attn.flash_attn_with_kvcache(**{**tensors, **rows}), expected)
    assert torch.equal(tensors["k_cache"], copies["k_cache"])


@pytest.mark.parametrize("num_splits", [1, 2, 3, 16, 128])
def test_splits_change_rounding_only(num_splits: int, device: str) -> None:
    problem = CacheProblem(
        b=3, capacity=300, seqlens=(300, 0, 77), dtype=BF16, sq=2, num_splits=num_splits
    )
    assert_cache_follows_rule(problem, published_cache_results(problem, device, flash_attn))


def test_decoding_token_by_token_is_causal_attention(device: str) -> None:
    problem = Problem(sq=12, sk=12, hq=4, hk=2, d=64, dtype=BF16, causal=True)
    q, k, v = problem.tensors(device).leaves
    caches = [torch.full_like(x, float("nan")) for x in (k, v)]
    steps = [
        flash_attn.flash_attn_with_kvcache(
            q[:, i : i + 1], *caches, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i, causal=True
        )
        for i in range(problem.sq)
    ]
    runs = [oracle_results(problem, problem.tensors(), t, backward=False) for t in (FP64, BF16)]
    check("out", torch.cat(steps, dim=1), runs[0]["out"], runs[1]["out"])
    assert torch.equal(caches[0], k)
    assert torch.equal(caches[1], v)
