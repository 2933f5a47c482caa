"""The Triton kernels: every row of the problem list that they serve, in Triton's interpreter on a
machine without a GPU, compiled on one with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Union

import pytest
import torch
from cache_problem import CacheProblem
from compare import check, poisoned_memory
from dropout_oracle import keep_mask
from oracle import combine as combine_oracle
from problem_types import BF16, FP8, FP16, FP32, FP64, Problem
from problems import CORE, DROPOUT, FA3, FA3_KVCACHE, KVCACHE, VARLEN
from running import (
    assert_cache_follows_rule,
    assert_follows_rule,
    assert_types,
    published_cache_results,
    published_results,
)
from torch import Tensor
from triton_here import DEVICE, needs_triton, old_numbers, on_device

import flash_attn
import flash_attn_interface as fa3
from flash_attn import _support
from flash_attn.backends import triton
from flash_attn.flash_attn_interface import _flash_attn_forward

pytestmark = [needs_triton, old_numbers, *on_device]

_ON_TRITON = {FP32: FP16, FP64: BF16}
AnyProblem = Union[Problem, CacheProblem]


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "triton")


# The interpreter's tiles are small: rows with more scores show it nothing new, and take long.
_MOST_SCORES = 250_000


def is_quick(problem: AnyProblem) -> bool:
    """Whether this machine runs a row in a few seconds."""
    sk = problem.capacity if isinstance(problem, CacheProblem) else problem.sk
    return DEVICE == "cuda" or problem.b * problem.hq * problem.sq * sk <= _MOST_SCORES


def is_fp8(problem: AnyProblem) -> bool:
    cache_dtype = problem.cache_dtype if isinstance(problem, CacheProblem) else None
    return FP8 in (problem.dtype, cache_dtype)


def served(rows: Sequence[AnyProblem]) -> list[AnyProblem]:
    """The rows that Triton's row of the truth table serves, in a dtype of its own, each once."""
    fitted = [
        replace(row, dtype=_ON_TRITON.get(row.dtype, row.dtype))
        for row in rows
        if not is_fp8(row) and not row.qv and row.value_dim <= _support.MAX_HEAD_DIM
        if is_quick(row)
    ]
    return list({str(row): row for row in fitted}.values())


@pytest.mark.parametrize("problem", served(CORE + VARLEN), ids=str)
def test_output_lse_and_gradients_follow_the_rule(problem: Problem) -> None:
    tensors = problem.tensors(DEVICE)
    got = published_results(problem, tensors, flash_attn)
    assert_types(problem, tensors, got)
    assert_follows_rule(problem, got)


@pytest.mark.parametrize("problem", served(FA3), ids=str)
def test_the_arguments_of_flash_attention_3_follow_the_rule(problem: Problem) -> None:
    has_backward = not problem.attention_chunk
    got = published_results(problem, problem.tensors(DEVICE), fa3, backward=has_backward)
    assert_follows_rule(problem, got, backward=has_backward)


@pytest.mark.parametrize("problem", served(DROPOUT), ids=str)
def test_dropout_is_the_documented_stream(problem: Problem) -> None:
    tensors = problem.tensors(DEVICE)
    with poisoned_memory():
        torch.manual_seed(7)
        rng_state = torch.zeros(2, dtype=torch.int64, device=DEVICE).random_()
    torch.manual_seed(7)
    got = published_results(problem, tensors, flash_attn)
    assert_follows_rule(problem, got, dropout_mask=keep_mask(problem, rng_state))


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        *((flash_attn, row) for row in served(KVCACHE)),
        *((fa3, row) for row in served(FA3_KVCACHE)),
    ],
    ids=lambda x: "fa3" if x is fa3 else "fa2" if x is flash_attn else str(x),
)
def test_the_cache_follows_the_rule(module: Any, problem: CacheProblem) -> None:
    assert_cache_follows_rule(problem, published_cache_results(problem, DEVICE, module))


@pytest.mark.parametrize("is_causal", [False, True])
def test_s_dmask_is_signed_by_the_mask(is_causal: bool) -> None:
    problem = Problem(sq=67, sk=91, dropout_p=0.3, dtype=FP16, causal=is_causal, hq=4, hk=2)
    q, k, v = problem.tensors(DEVICE).leaves
    with poisoned_memory():
        _, _, s_dmask, rng_state = _flash_attn_forward(
            q, k, v, 0.3, problem.d**-0.5, is_causal, -1, -1, 0.0, None, True
        )
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, 2))
    hidden = torch.ones(67, 91, dtype=torch.bool).tril(91 - 67).logical_not() & is_causal
    scores = scores.cpu() / math.sqrt(problem.d)
    scores = scores.masked_fill(hidden, -torch.inf)
    expected = torch.exp(scores - scores.amax(-1, keepdim=True))
    assert s_dmask.shape == (problem.b, problem.hq, 128, 128)
    s_dmask = s_dmask.cpu()
    assert (s_dmask[:, :, 67:] == 0).all()
    assert (s_dmask[:, :, :, 91:] == 0).all()
    inside = s_dmask[:, :, :67, :91]
    check("|S_dmask|", inside.abs(), expected, expected.half())
    kept = keep_mask(problem, rng_state.cpu())
    assert torch.equal(inside.signbit() & ~hidden, ~kept & ~hidden)


def test_combine_merges_parts_and_skips_empty_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 2, 5, 4, 40, generator=generator)
    lses = torch.randn(3, 2, 5, 4, generator=generator)
    lses[1, 0] = math.inf
    lses[2, :, 3] = -math.inf
    lses[:, 1, 4] = math.inf
    outs[lses.isinf()] = math.nan
    out, lse = fa3.flash_attn_combine(outs.to(DEVICE), lses.to(DEVICE))
    expected = combine_oracle(outs.double().masked_fill(lses.isinf().unsqueeze(-1), 0), lses)
    torch.testing.assert_close(lse.cpu().double(), expected[1].double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.cpu().double(), expected[0].double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_repeat_bit_by_bit(deterministic: bool) -> None:
    problem = Problem(
        sq=70, sk=90, hq=4, hk=2, dtype=BF16, causal=True, deterministic=deterministic
    )
    tensors = problem.tensors(DEVICE)
    first, second = (published_results(problem, tensors, flash_attn) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_log_names_the_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASH_ATTN_LOG", "1")
    x: Tensor = torch.zeros(1, 5, 3, 24, dtype=BF16, device=DEVICE)
    flash_attn.flash_attn_func(x, x, x)
    assert " on triton: " in capsys.readouterr().err


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_call_runs_on_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def noted(name: str) -> Any:
        real = getattr(triton, name)
        return lambda call, op: ran.append(name) or real(call, op)

    for name in ("forward", "backward"):
        monkeypatch.setattr(triton, name, noted(name))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_func(q, k, v, causal=True)

    problem = Problem(sq=40, sk=70, hq=4, hk=2, dtype=BF16, causal=True)
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        tensors = problem.tensors(DEVICE)
        leaves = [x.requires_grad_() for x in tensors.leaves]
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, tensors.dout)))
    assert ran == ["forward", "backward"] * 2
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results))
