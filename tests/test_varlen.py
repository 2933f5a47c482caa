"""Packed sequences of different lengths, and what only the private varlen operator takes."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
from compare import check, poisoned_memory
from oracle import varlen_attention
from problem_types import BF16, FP32, FP64, Problem, varlen
from problems import VARLEN
from running import assert_follows_rule, assert_types, published_results
from torch import Tensor

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward


@pytest.mark.parametrize("problem", VARLEN, ids=str)
def test_output_lse_and_gradients_follow_the_rule(problem: Problem, device: str) -> None:
    tensors = problem.tensors(device)
    got = published_results(problem, tensors, flash_attn)
    assert_types(problem, tensors, got)
    assert_follows_rule(problem, got)


ROW = varlen((17, 30, 1), (33, 40, 9), hq=4, hk=2, dtype=BF16, causal=True)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_max_seqlen_may_exceed_the_longest_sequence(as_tensor: bool, device: str) -> None:
    tensors = ROW.tensors(device)
    sequences = (tensors.cu_seqlens_q, tensors.cu_seqlens_k)
    longest = (100, 200)
    if as_tensor:
        longest = tuple(torch.tensor(n, dtype=torch.int32, device=device) for n in longest)
    tight = flash_attn.flash_attn_varlen_func(*tensors.leaves, *sequences, 30, 40, causal=True)
    loose = flash_attn.flash_attn_varlen_func(*tensors.leaves, *sequences, *longest, causal=True)
    torch.testing.assert_close(loose, tight, rtol=0, atol=0)


def test_boundaries_overwritten_before_backward_are_an_error(device: str) -> None:
    """Gradients would silently be those of other sequences."""
    tensors = ROW.tensors(device)
    leaves = [x.requires_grad_() for x in tensors.leaves]
    sequences = (tensors.cu_seqlens_q, tensors.cu_seqlens_k)
    for cu_seqlens in sequences:
        out = flash_attn.flash_attn_varlen_func(*leaves, *sequences, 50, 50, causal=True)
        cu_seqlens[1] -= 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_rows_outside_the_sequences_are_zero(device: str) -> None:
    """Totals may exceed the last offset, as when a batch is padded for CUDA graphs."""
    tensors = ROW.tensors(device)
    padding = [torch.full_like(x[:5], float("nan")) for x in tensors.leaves]
    leaves = [torch.cat(pair).requires_grad_() for pair in zip(tensors.leaves, padding)]
    sequences = (tensors.cu_seqlens_q, tensors.cu_seqlens_k, 30, 40)
    with poisoned_memory():
        padded = flash_attn.flash_attn_varlen_func(*leaves, *sequences, causal=True)
        exact = flash_attn.flash_attn_varlen_func(*tensors.leaves, *sequences, causal=True)
        dout = torch.cat((tensors.dout, torch.ones_like(tensors.dout[:5])))
        gradients = torch.autograd.grad(padded, leaves, dout)
    assert torch.equal(padded[:-5], exact)
    for x in (padded, *gradients):
        assert (x[-5:] == 0).all()
        assert x.isfinite().all()


def private_forward(
    problem: Problem, leaves: tuple[Tensor, ...], sequences: tuple[Any, ...], **extra: Any
) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        out, lse, _, _ = _flash_attn_varlen_forward(
            *leaves,
            *sequences,
            0.0,
            problem.d**-0.5,
            problem.causal,
            window_size_left=problem.window[0],
            window_size_right=problem.window[1],
            softcap=problem.softcap,
            **extra,
        )
    return out, lse


def assert_private_follows_rule(
    problem: Problem, got: tuple[Tensor, Tensor], leaves: tuple[Tensor, ...], **extra: Any
) -> None:
    leaves = tuple(x.cpu() for x in leaves)
    extra = {name: x.cpu() for name, x in extra.items()}
    tensors = problem.tensors()
    runs = [
        varlen_attention(
            *leaves,
            tensors.cu_seqlens_q,
            tensors.cu_seqlens_k,
            causal=problem.causal,
            window=problem.window,
            softcap=problem.softcap,
            dtype=dtype,
            **extra,
        )
        for dtype in (FP64, problem.dtype)
    ]
    for name, result, reference, low in zip(("out", "lse"), got, *runs):
        check(f"{problem} {name}", result, reference, low)


@pytest.mark.parametrize(
    ("used", "left"),
    [
        ((20, 40, 0), None),
        (None, (5, 0, 9)),
        ((20, 40, 7), (3, 30, 2)),
        ((20, 40, 7), (20, 0, 6)),
    ],
)
@pytest.mark.parametrize(
    "problem",
    [ROW, varlen((17, 30, 1), (33, 40, 9), dtype=FP32, window=(10, 4))],
    ids=str,
)
def test_seqused_and_leftpad_choose_the_keys(
    problem: Problem,
    used: Optional[tuple[int, ...]],
    left: Optional[tuple[int, ...]],
    device: str,
) -> None:
    if device == "cuda" and problem.dtype == FP32:
        pytest.skip("GPU kernels take half precision")
    tensors = problem.tensors(device)
    extra = {
        name: torch.tensor(values, dtype=torch.int32, device=device)
        for name, values in (("seqused_k", used), ("leftpad_k", left))
        if values is not None
    }
    leaves = tuple(x.clone() for x in tensors.leaves)
    for i, begin in enumerate(tensors.cu_seqlens_k[:-1].tolist()):
        end = begin + problem.lens_k[i]
        for x in leaves[1:]:
            x[begin + (used[i] if used else problem.lens_k[i]) : end] = float("nan")
            x[begin : begin + (left[i] if left else 0)] = float("nan")
    sequences = (tensors.cu_seqlens_q, tensors.cu_seqlens_k, problem.sq, problem.sk)
    got = private_forward(problem, leaves, sequences, **extra)
    assert_private_follows_rule(problem, got, leaves, **extra)


@pytest.mark.parametrize("page", [1, 7, 16, 256])
def test_paged_keys_equal_contiguous_keys(page: int, device: str) -> None:
    tensors = ROW.tensors(device)
    q, k, v = tensors.leaves
    pages = [-(-n // page) for n in ROW.lens_k]
    order = torch.randperm(sum(pages) + 1, generator=torch.Generator().manual_seed(page))
    table = torch.full((ROW.b, max(pages)), int(order[-1]), dtype=torch.int32)
    paged = [
        torch.full((len(order), page, *x.shape[1:]), float("nan"), dtype=x.dtype) for x in (k, v)
    ]
    taken = 0
    for i, begin in enumerate(tensors.cu_seqlens_k[:-1].tolist()):
        table[i, : pages[i]] = order[taken : taken + pages[i]]
        taken += pages[i]
        for position in range(ROW.lens_k[i]):
            block, row = int(table[i, position // page]), position % page
            for target, source in zip(paged, (k, v)):
                target[block, row] = source[begin + position].cpu()
    sequences = (tensors.cu_seqlens_q, tensors.cu_seqlens_k, ROW.sq, ROW.sk)
    with poisoned_memory():
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            q,
            *(x.to(device) for x in paged),
            *sequences,
            causal=True,
            return_attn_probs=True,
            block_table=table.to(device),
        )
    assert_private_follows_rule(ROW, (out, lse), tensors.leaves)
