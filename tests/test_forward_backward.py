"""Dense attention in every packing, forward and backward, against the oracle."""

from __future__ import annotations

import pytest
import torch
from problem_types import BF16, FP64, Problem
from problems import CORE
from running import assert_follows_rule, assert_types, published_results

import flash_attn


@pytest.mark.parametrize("problem", CORE, ids=str)
def test_output_lse_and_gradients_follow_the_rule(problem: Problem, device: str) -> None:
    tensors = problem.tensors(device)
    got = published_results(problem, tensors, flash_attn)
    assert_types(problem, tensors, got)
    assert got["S_dmask"].shape == (0,)
    assert_follows_rule(problem, got)


@pytest.mark.parametrize("packing", ["separate", "kv", "qkv"])
def test_output_alone_is_the_same_output(packing: str, device: str) -> None:
    problem = Problem(dtype=BF16, packing=packing, causal=True)
    tensors = problem.tensors(device)
    kind = {"separate": "", "kv": "kvpacked_", "qkv": "qkvpacked_"}[packing]
    function = getattr(flash_attn, f"flash_attn_{kind}func")
    alone = function(*tensors.leaves, causal=True)
    with torch.no_grad():
        without_grad = function(*tensors.leaves, causal=True)
    out, _, _ = function(*tensors.leaves, causal=True, return_attn_probs=True)
    assert torch.equal(alone, out)
    assert torch.equal(without_grad, out)


def test_positional_arguments_have_the_published_order(device: str) -> None:
    problem = Problem(sq=33, sk=47, dtype=BF16, alibi="h")
    tensors = problem.tensors(device)
    slopes = tensors.alibi_slopes
    positional = flash_attn.flash_attn_func(
        *tensors.leaves, 0.0, 0.2, True, (9, 3), 0.0, slopes, True, True
    )
    named = flash_attn.flash_attn_func(
        *tensors.leaves,
        softmax_scale=0.2,
        causal=True,
        window_size=(9, 3),
        alibi_slopes=slopes,
        deterministic=True,
        return_attn_probs=True,
    )
    assert all(torch.equal(a, b) for a, b in zip(positional, named))


def test_only_the_inputs_that_need_gradients_get_them(device: str) -> None:
    problem = Problem(sq=33, sk=47, dtype=BF16, causal=True)
    tensors = problem.tensors(device)
    everything = published_results(problem, tensors, flash_attn)
    for wanted in range(3):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(tensors.leaves)]
        flash_attn.flash_attn_func(*leaves, causal=True).backward(tensors.dout)
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]
        assert torch.equal(leaves[wanted].grad, everything[("dq", "dk", "dv")[wanted]])


def test_no_gradient_flows_through_the_lse(device: str) -> None:
    tensors = Problem(sq=20, sk=30, dtype=BF16).tensors(device)
    leaves = [x.requires_grad_() for x in tensors.leaves]
    out, lse, s_dmask = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
    assert out.requires_grad
    assert not lse.requires_grad
    assert not s_dmask.requires_grad


def test_backward_twice_gives_the_same_gradients(device: str) -> None:
    problem = Problem(sq=129, sk=200, hq=4, hk=2, dtype=BF16, causal=True, deterministic=True)
    tensors = problem.tensors(device)
    leaves = [x.requires_grad_() for x in tensors.leaves]
    out = flash_attn.flash_attn_func(*leaves, causal=True, deterministic=True)
    first = torch.autograd.grad(out, leaves, tensors.dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, tensors.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    "problem",
    [
        Problem(b=1, sq=5, sk=7, hq=2, hk=1, d=3, dtype=FP64, causal=True),
        Problem(b=1, sq=7, sk=4, hq=2, hk=2, d=4, dtype=FP64, causal=True, alibi="bh"),
        Problem(b=2, sq=4, sk=6, hq=1, hk=1, d=5, dtype=FP64, window=(2, 1), softcap=3.0),
        Problem(b=1, sq=6, sk=6, hq=2, hk=2, d=2, dtype=FP64, packing="qkv", softmax_scale=0.9),
        Problem(b=1, sq=4, sk=6, hq=4, hk=2, d=2, dtype=FP64, packing="kv"),
    ],
    ids=str,
)
def test_gradients_are_the_derivative_of_the_output(problem: Problem) -> None:
    tensors = problem.tensors()
    leaves = [x.requires_grad_() for x in tensors.leaves]
    kind = {"separate": "", "kv": "kvpacked_", "qkv": "qkvpacked_"}[problem.packing]
    function = getattr(flash_attn, f"flash_attn_{kind}func")

    def output(*inputs: torch.Tensor) -> torch.Tensor:
        return function(
            *inputs,
            softmax_scale=problem.softmax_scale,
            causal=problem.causal,
            window_size=problem.window,
            softcap=problem.softcap,
            alibi_slopes=tensors.alibi_slopes,
        )

    assert torch.autograd.gradcheck(output, leaves)


def test_large_scores_do_not_overflow(device: str) -> None:
    problem = Problem(sq=40, sk=50, dtype=BF16, softmax_scale=40.0, causal=True)
    got = published_results(problem, problem.tensors(device), flash_attn)
    assert all(x.isfinite().all() for x in got.values())
    assert_follows_rule(problem, got)
