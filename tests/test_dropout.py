"""Dropout: one documented random stream, reproducible, the same forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import check, poisoned_memory
from dropout_oracle import keep_mask, keeps, philox4x32_10
from oracle import masked_scores, visible_keys
from problem_types import BF16, FP32, FP64, Problem, Tensors, varlen
from problems import DROPOUT
from running import assert_follows_rule, assert_types, published_results
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)


def scores_rule(problem: Problem, tensors: Tensors) -> tuple[Any, ...]:
    """The arguments from window_size_left to alibi_slopes of the private operators."""
    return (*problem.window, problem.softcap, tensors.alibi_slopes)


def sequences(problem: Problem, tensors: Tensors) -> tuple[Any, ...]:
    if not problem.is_varlen:
        return ()
    return tensors.cu_seqlens_q, tensors.cu_seqlens_k, problem.sq, problem.sk


def private_forward(problem: Problem, tensors: Tensors) -> tuple[Tensor, ...]:
    """out, lse, S_dmask and rng_state of the private operator for a row."""
    function = _flash_attn_varlen_forward if problem.is_varlen else _flash_attn_forward
    with poisoned_memory():
        return function(
            *problem.split(tensors.leaves),
            *sequences(problem, tensors),
            problem.dropout_p,
            problem.d**-0.5,
            problem.causal,
            *scores_rule(problem, tensors),
            True,
        )


def mask_of(problem: Problem, device: str, seed: int) -> Tensor:
    """The oracle's mask for the state that the private operator draws after seeding."""
    torch.manual_seed(seed)
    return keep_mask(problem, private_forward(problem, problem.tensors(device))[3])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_oracles_generator_gives_the_published_words(
    counter: tuple, key: tuple, words: str
) -> None:
    assert " ".join(f"{word:08x}" for word in philox4x32_10(counter, key)) == words


@pytest.mark.parametrize("problem", DROPOUT, ids=str)
def test_output_lse_and_gradients_follow_the_rule(problem: Problem, device: str) -> None:
    tensors = problem.tensors(device)
    mask = mask_of(problem, device, seed=7)
    torch.manual_seed(7)
    got = published_results(problem, tensors, flash_attn)
    assert_types(problem, tensors, got)
    assert_follows_rule(problem, got, dropout_mask=mask)


def sequence_ranges(problem: Problem) -> list[tuple[slice, slice]]:
    """Rows of q and of k of each sequence, for a batch or for packed sequences."""
    if not problem.is_varlen:
        return [(slice(0, problem.sq), slice(0, problem.sk))] * problem.b
    starts = [
        [sum(lens[:i]) for i in range(problem.b)] for lens in (problem.lens_q, problem.lens_k)
    ]
    return [
        (slice(a, a + m), slice(c, c + n))
        for a, c, m, n in zip(*starts, problem.lens_q, problem.lens_k)
    ]


def exponentials(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What |S_dmask| holds, exp(score - row maximum), and which of its entries are visible."""
    shape = [-(-n // 128) * 128 for n in (problem.sq, problem.sk)]
    values = torch.zeros(problem.b, problem.hq, *shape, dtype=FP64)
    visible = torch.zeros(values.shape, dtype=torch.bool)
    tensors = problem.tensors()
    q, k, _ = (x.to(dtype) for x in problem.split(tensors.leaves))
    slopes = tensors.alibi_slopes
    for i, (rows, keys) in enumerate(sequence_ranges(problem)):
        q_i, k_i = (q[rows], k[keys]) if problem.is_varlen else (q[i], k[i])
        sq, sk = len(q_i), len(k_i)
        if 0 in (sq, sk):
            continue
        seen = visible_keys(sq, sk, causal=problem.causal, window=problem.window)
        scores = masked_scores(
            q_i[None],
            k_i.repeat_interleave(problem.hq // problem.hk, dim=1)[None],
            softmax_scale=problem.d**-0.5,
            visible=seen,
            alibi_slopes=slopes[i] if problem.alibi == "bh" else slopes,
        )
        part = torch.exp(scores - scores.amax(-1, keepdim=True)).nan_to_num(0.0)
        values[i, :, :sq, :sk] = part[0].to(dtype)
        visible[i, :, :sq, :sk] = seen
    return values, visible


@pytest.mark.parametrize("problem", DROPOUT, ids=str)
def test_s_dmask_holds_the_exponentials_signed_by_the_mask(problem: Problem, device: str) -> None:
    torch.manual_seed(7)
    _, _, s_dmask, rng_state = private_forward(problem, problem.tensors(device))
    kept = keep_mask(problem, rng_state)
    expected, visible = exponentials(problem, FP64)
    low, _ = exponentials(problem, problem.dtype)
    assert s_dmask.dtype == problem.dtype
    check(f"{problem} |S_dmask|", s_dmask.abs(), expected, low)
    s_dmask = s_dmask.cpu()
    assert (s_dmask[~visible] == 0).all()
    padded = torch.ones(visible.shape, dtype=torch.bool)
    padded[:, :, : problem.sq, : problem.sk] = kept
    assert torch.equal(s_dmask.signbit()[visible], ~padded[visible])


@pytest.mark.parametrize("problem", [row for row in DROPOUT if row.packing == "separate"], ids=str)
def test_the_private_backward_repeats_the_mask_from_rng_state(
    problem: Problem, device: str
) -> None:
    tensors = problem.tensors(device)
    torch.manual_seed(3)
    got = published_results(problem, tensors, flash_attn)
    torch.manual_seed(3)
    out, lse, _, rng_state = private_forward(problem, tensors)
    assert torch.equal(out, got["out"])
    gradients = [torch.full_like(x, math.nan) for x in tensors.leaves]
    backward = _flash_attn_varlen_backward if problem.is_varlen else _flash_attn_backward
    before = torch.get_rng_state()
    backward(
        tensors.dout,
        *tensors.leaves,
        out,
        lse,
        *gradients,
        *sequences(problem, tensors),
        problem.dropout_p,
        problem.d**-0.5,
        problem.causal,
        *scores_rule(problem, tensors),
        False,
        rng_state,
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, gradient in zip(("dq", "dk", "dv"), gradients):
        assert torch.equal(gradient, got[name]), name


ROW = Problem(sq=64, sk=96, hq=4, hk=2, dtype=BF16, dropout_p=0.25, causal=True)


def seeded_output(tensors: Tensors, seed: int, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    return flash_attn.flash_attn_func(*tensors.leaves, dropout_p=0.25, causal=True, **options)


def test_a_seed_reproduces_and_another_does_not(device: str) -> None:
    tensors = ROW.tensors(device)
    assert torch.equal(seeded_output(tensors, 1), seeded_output(tensors, 1))
    assert not torch.equal(seeded_output(tensors, 1), seeded_output(tensors, 2))
    first = seeded_output(tensors, 1)
    second = flash_attn.flash_attn_func(*tensors.leaves, dropout_p=0.25, causal=True)
    assert not torch.equal(first, second)


def test_rng_state_is_two_integers_on_the_device(device: str) -> None:
    rng_state = private_forward(ROW, ROW.tensors(device))[3]
    assert rng_state.shape == (2,)
    assert rng_state.dtype == torch.int64
    assert rng_state.device.type == device


def test_without_dropout_nothing_is_drawn() -> None:
    tensors = ROW.tensors()
    before = torch.get_rng_state()
    flash_attn.flash_attn_func(*tensors.leaves, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.004, 0.1, 0.17, 0.5, 0.9, 0.999])
def test_the_kept_fraction_is_that_of_the_threshold(p: float, device: str) -> None:
    problem = Problem(b=2, hq=4, hk=4, sq=256, sk=256, d=8, dtype=BF16, dropout_p=p)
    torch.manual_seed(11)
    s_dmask = private_forward(problem, problem.tensors(device))[2]
    probability = (math.floor((1 - p) * 255) + 1) / 256
    deviation = math.sqrt(probability * (1 - probability) / s_dmask.numel())
    kept = (~s_dmask.signbit()).double()
    assert kept.mean().item() == pytest.approx(probability, abs=5 * deviation)
    per_head = kept.mean(dim=(2, 3)).flatten()
    assert (per_head - probability).abs().max().item() < 5 * deviation * math.sqrt(8)


def test_heads_sequences_and_tiles_have_masks_of_their_own(device: str) -> None:
    problem = Problem(b=2, hq=2, sq=128, sk=128, d=8, dtype=BF16, dropout_p=0.5)
    torch.manual_seed(11)
    kept = ~private_forward(problem, problem.tensors(device))[2].signbit().cpu()
    heads = kept.flatten(0, 1)
    tiles = torch.stack([block for row in heads[0].split(16) for block in row.split(32, dim=1)])
    for parts in (heads, tiles):
        flat = parts.flatten(1).double() - 0.5
        agreement = (flat @ flat.T) * 4 / flat.shape[1]
        agreement.fill_diagonal_(0)
        assert agreement.abs().max().item() < 5 / math.sqrt(flat.shape[1])


def test_long_rows_of_many_heads_follow_the_stream(device: str) -> None:
    problem = Problem(b=1, sq=300, sk=600, hq=16, hk=4, d=16, dtype=BF16, dropout_p=0.3)
    tensors = problem.tensors(device)
    torch.manual_seed(2)
    _, _, s_dmask, rng_state = private_forward(problem, tensors)
    kept = ~s_dmask.signbit().cpu()[:, :, : problem.sq, : problem.sk]
    seed, offset = rng_state.tolist()
    sampled = torch.randint(kept.numel(), (3000,), generator=torch.Generator().manual_seed(2))
    for head, i, j in zip(*(x.tolist() for x in torch.unravel_index(sampled, kept.shape[1:]))):
        assert kept[0, head, i, j] == keeps(seed, offset, problem.dropout_p, head, i, j)
    torch.manual_seed(2)
    assert_follows_rule(problem, published_results(problem, tensors, flash_attn), dropout_mask=kept)


def test_checkpointing_recomputes_the_same_mask(device: str) -> None:
    leaves = [x.requires_grad_() for x in ROW.tensors(device).leaves]
    dout = ROW.tensors(device).dout
    runs = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(5)
        out = wrap(lambda *x: flash_attn.flash_attn_func(*x, dropout_p=0.25), *leaves)
        runs.append((out, *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize(
    "problem",
    [
        Problem(b=1, sq=7, sk=9, hq=2, hk=1, d=3, dtype=FP64, dropout_p=0.4, causal=True),
        varlen((3, 5), (6, 2), hq=2, hk=2, d=2, dtype=FP64, dropout_p=0.3, causal=True),
    ],
    ids=str,
)
def test_gradients_are_the_derivative_under_a_fixed_seed(problem: Problem) -> None:
    tensors = problem.tensors()
    leaves = [x.requires_grad_() for x in tensors.leaves]
    kind = "varlen_" if problem.is_varlen else ""

    def output(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return getattr(flash_attn, f"flash_attn_{kind}func")(
            *inputs,
            *sequences(problem, tensors),
            dropout_p=problem.dropout_p,
            causal=problem.causal,
        )

    assert torch.autograd.gradcheck(output, leaves)


def test_the_mean_over_seeds_is_attention_without_dropout() -> None:
    problem = Problem(b=1, sq=8, sk=16, hq=1, hk=1, d=4, dtype=FP32)
    leaves = problem.tensors().leaves
    # At p = 0.5 the threshold keeps exactly half of the bytes, so the mean has no bias.
    torch.manual_seed(0)
    outs = [flash_attn.flash_attn_func(*leaves, dropout_p=0.5) for _ in range(2000)]
    mean, deviation = torch.stack(outs).mean(0), torch.stack(outs).std(0) / math.sqrt(len(outs))
    expected = flash_attn.flash_attn_func(*leaves)
    assert ((mean - expected).abs() < 5 * deviation).all()
