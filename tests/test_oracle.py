"""The oracle against torch's own attention and against values worked out by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from compare import check, poisoned_memory
from oracle import (
    alibi_bias,
    attention,
    combine,
    kvcache_attention,
    rotate,
    varlen_attention,
    visible_keys,
)
from problem_types import BF16, FP16, FP32, FP64, Problem, place
from problems import CORE, DROPOUT, FA3, FA3_KVCACHE, KVCACHE, SMOKE, VARLEN
from running import oracle_cache_results, oracle_results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """torch's attention in the (b, s, h, d) layout."""
    with sdpa_kernel(SDPBackend.MATH):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("hq", "hk"), [(3, 3), (6, 2), (4, 1)])
def test_agrees_with_sdpa_forward_and_backward(hq: int, hk: int, causal: bool) -> None:
    leaves = [
        x.requires_grad_() for x in (randn(2, 9, hq, 8), randn(2, 9, hk, 8), randn(2, 9, hk, 5))
    ]
    dout = randn(2, 9, hq, 5, seed=1)
    out, _ = attention(*leaves, causal=causal)
    q, *kv = leaves
    repeated = [x.repeat_interleave(hq // hk, dim=2) for x in kv]
    expected = sdpa(q, *repeated, is_causal=causal)
    same(out, expected)
    for got, want in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout)
    ):
        same(got, want)


@pytest.mark.parametrize(("sq", "sk"), [(5, 9), (9, 9), (7, 3)])
def test_agrees_with_sdpa_under_mask_and_bias(sq: int, sk: int) -> None:
    q, k, v = randn(2, sq, 4, 8), randn(2, sk, 4, 8), randn(2, sk, 4, 8)
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    bias = torch.full((2, 4, sq, sk), -math.inf, dtype=FP64)
    for i in range(sq):
        for j in range(sk):
            distance = i + sk - sq - j
            if -1 <= distance <= 3:
                bias[:, :, i, j] = -slopes * abs(distance)
    out, _ = attention(q, k, v, window=(3, 1), alibi_slopes=slopes, softmax_scale=0.3, dtype=FP64)
    expected = sdpa(q, k, v, attn_mask=bias, scale=0.3)
    blind = (bias == -math.inf).all(-1)[0, 0]
    same(out[:, ~blind], expected[:, ~blind])
    assert (out[:, blind] == 0).all()


def test_lse_is_the_natural_log_of_the_sum() -> None:
    q, k, v = (
        torch.ones(1, 1, 1, 1),
        torch.tensor([2.0, 3.0]).view(1, 2, 1, 1),
        torch.ones(1, 2, 1, 1),
    )
    out, lse = attention(q, k, v, softmax_scale=1.0)
    assert lse.item() == pytest.approx(math.log(math.exp(2) + math.exp(3)), abs=1e-14)
    assert out.item() == pytest.approx(1.0)


def test_two_keys_by_hand() -> None:
    q = torch.tensor([[1.0, 2.0]]).view(1, 1, 1, 2)
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    v = torch.tensor([[10.0], [20.0]]).view(1, 2, 1, 1)
    out, _ = attention(q, k, v, softmax_scale=2.0, softcap=3.0)
    a, b = (math.exp(3 * math.tanh(s / 3)) for s in (2.0, 4.0))
    assert out.item() == pytest.approx((10 * a + 20 * b) / (a + b), abs=1e-12)


def test_scale_defaults_to_the_head_dim_and_counts_qv() -> None:
    q, k, v, qv = (randn(1, 3, 1, d, seed=d) for d in (4, 4, 5, 5))
    same(attention(q, k, v)[1], attention(q, k, v, softmax_scale=0.5)[1])
    joined_q, joined_k = torch.cat((q, qv), -1), torch.cat((k, v), -1)
    for got, want in zip(attention(q, k, v, qv=qv), attention(joined_q, joined_k, v)):
        same(got, want)


def test_a_descale_multiplies_its_key_head() -> None:
    q, k, v = randn(2, 3, 4, 8), randn(2, 5, 2, 8), randn(2, 5, 2, 8)
    dq, dk, dv = (randn(2, 2, seed=i).exp() for i in (1, 2, 3))
    got = attention(q, k, v, q_descale=dq, k_descale=dk, v_descale=dv)
    scaled_q = q * dq[:, [0, 0, 1, 1]][:, None, :, None]
    want = attention(scaled_q, k * dk[:, None, :, None], v * dv[:, None, :, None])
    for a, b in zip(got, want):
        same(a, b)


def test_masks_stand_on_the_last_query_and_key() -> None:
    def drawn(*args, **options) -> list[str]:
        return ["".join(".x"[int(seen)] for seen in row) for row in visible_keys(*args, **options)]

    assert drawn(2, 4, causal=True) == ["xxx.", "xxxx"]
    assert drawn(4, 2, causal=True) == ["..", "..", "x.", "xx"]
    assert drawn(2, 4, window=(1, 0)) == [".xx.", "..xx"]
    assert drawn(2, 4, window=(-1, 0)) == drawn(2, 4, causal=True)
    assert drawn(3, 3, window=(0, -1)) == ["xxx", ".xx", "..x"]
    assert drawn(3, 3, window=(0, 5), causal=True) == ["x..", ".x.", "..x"]
    assert drawn(4, 4, attention_chunk=2) == ["xx..", "xx..", "..xx", "..xx"]
    assert drawn(3, 1, attention_chunk=2) == [".", ".", "x"]


def test_alibi_falls_with_the_distance_to_the_diagonal() -> None:
    bias = alibi_bias(torch.tensor([0.5, 2.0]), 2, 3)
    assert bias[0, 0].tolist() == [[-0.5, 0.0, -0.5], [-1.0, -0.5, 0.0]]
    same(bias[0, 1], 4 * bias[0, 0])


def test_rows_without_keys_give_zero_inf_and_no_nan_in_gradients() -> None:
    leaves = [randn(1, s, 1, 4).requires_grad_() for s in (5, 2, 2)]
    out, lse = attention(*leaves, causal=True)
    assert (out[:, :3] == 0).all()
    assert (lse[..., :3] == math.inf).all()
    assert lse[..., 3:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert (dq[:, :3] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    lse_gradients = torch.autograd.grad(
        attention(*leaves, causal=True)[1][..., 3:].sum(), leaves[:2]
    )
    assert all(x.isfinite().all() for x in lse_gradients)


@pytest.mark.parametrize("sizes", [(3, 0), (0, 3), (0, 0)])
def test_empty_sides_are_defined(sizes: tuple[int, int]) -> None:
    out, lse = attention(
        randn(2, sizes[0], 1, 4), randn(2, sizes[1], 1, 4), randn(2, sizes[1], 1, 4)
    )
    assert (out == 0).all()
    assert (lse == math.inf).all()


def test_dropout_mask_removes_and_rescales() -> None:
    q, k, v = (
        torch.zeros(1, 1, 1, 2),
        torch.zeros(1, 2, 1, 2),
        torch.tensor([1.0, 3.0]).view(1, 2, 1, 1),
    )
    keep = torch.tensor([True, False]).view(1, 1, 1, 2)
    out, lse = attention(q, k, v, dropout_mask=keep, dropout_p=0.75)
    assert out.item() == pytest.approx(0.5 * 1.0 / 0.25)
    assert lse.item() == pytest.approx(math.log(2))


def test_varlen_is_dense_attention_per_sequence() -> None:
    q, k, v = randn(7, 4, 8), randn(9, 2, 8), randn(9, 2, 6)
    slopes = randn(2, 4).exp()
    cu_q, cu_k = torch.tensor([0, 3, 7]), torch.tensor([0, 5, 9])
    out, lse = varlen_attention(
        q,
        k,
        v,
        cu_q,
        cu_k,
        seqused_q=torch.tensor([2, 4]),
        seqused_k=torch.tensor([4, 4]),
        leftpad_k=torch.tensor([1, 0]),
        alibi_slopes=slopes,
        causal=True,
    )
    first = attention(q[None, :2], k[None, 1:4], v[None, 1:4], alibi_slopes=slopes[0], causal=True)
    second = attention(q[None, 3:], k[None, 5:], v[None, 5:], alibi_slopes=slopes[1], causal=True)
    same(out[:2], first[0][0])
    same(out[3:], second[0][0])
    same(lse[:, 3:], second[1][0])
    assert (out[2] == 0).all()
    assert (lse[:, 2] == math.inf).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_quarter_turn_by_hand(interleaved: bool) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=FP64).view(1, 1, 5)
    cos, sin = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    turned = rotate(x, cos, sin, torch.tensor([1]), interleaved=interleaved)
    expected = [-2.0, 1.0, 3.0, 4.0, 5.0] if interleaved else [-3.0, 2.0, 1.0, 4.0, 5.0]
    assert turned.flatten().tolist() == expected


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    positions = torch.arange(20)
    angle = positions[:, None] * torch.tensor([0.3, 0.7], dtype=FP64)
    q, k = randn(1, 1, 6), randn(1, 1, 6, seed=1)

    def score(i: int, j: int) -> float:
        turned = [
            rotate(x, angle.cos(), angle.sin(), torch.tensor([p]), interleaved=True)
            for x, p in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(15, 10), abs=1e-12)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_cache_append_is_attention_over_the_longer_sequence() -> None:
    k_all, v_all, q = randn(1, 8, 2, 4), randn(1, 8, 2, 4, seed=1), randn(1, 3, 2, 4, seed=2)
    cache = [torch.full((1, 10, 2, 4), math.nan, dtype=FP64) for _ in range(2)]
    for c, x in zip(cache, (k_all, v_all)):
        c[:, :5] = x[:, :5]
    out, lse, k_cache, v_cache = kvcache_attention(
        q, *cache, k_all[:, 5:], v_all[:, 5:], cache_seqlens=torch.tensor([5]), causal=True
    )
    expected = attention(q, k_all, v_all, causal=True)
    same(out, expected[0])
    same(lse, expected[1])
    same(k_cache[:, :8], k_all)
    same(v_cache[:, :8], v_all)
    assert k_cache[:, 8:].isnan().all()
    assert cache[0][:, 5:].isnan().all()


def test_pages_hold_what_the_dense_cache_holds() -> None:
    dense = randn(2, 12, 1, 4)
    pages, table = (
        dense.reshape(6, 4, 1, 4)[[3, 0, 5, 1, 4, 2]],
        torch.tensor([[1, 3, 5], [0, 4, 2]]),
    )
    options = {"cache_seqlens": torch.tensor([7, 10]), "causal": True}
    q, new = randn(2, 2, 1, 4, seed=3), randn(2, 2, 1, 4, seed=4)
    got = kvcache_attention(q, pages, pages, new, new, block_table=table, **options)
    want = kvcache_attention(q, dense, dense, new, new, **options)
    same(got[0], want[0])
    same(got[2][table.flatten()].reshape(dense.shape), want[2])


def test_combining_parts_is_attention_over_the_union() -> None:
    q, k, v = randn(2, 4, 2, 8), randn(2, 9, 2, 8), randn(2, 9, 2, 8)
    parts = [attention(q, k[:, s], v[:, s]) for s in (slice(0, 2), slice(2, 9))]
    out_partial = torch.stack([parts[0][0], parts[1][0], torch.ones_like(q), torch.ones_like(q)])
    lse_partial = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    nothing = torch.full_like(lse_partial[:1], math.inf)
    lse_partial = torch.cat((lse_partial, nothing, -nothing))
    out, lse = combine(out_partial, lse_partial)
    expected_out, expected_lse = attention(q, k, v)
    same(out, expected_out)
    same(lse, expected_lse.transpose(1, 2))
    nothing_out, nothing_lse = combine(out_partial[2:], lse_partial[2:])
    assert (nothing_out == 0).all()
    assert (nothing_lse == math.inf).all()


def test_precisions_order_the_yardstick() -> None:
    tensors = Problem(sq=70, sk=80, d=64, dtype=FP64, causal=True).tensors()
    runs = {t: oracle_results(Problem(), tensors, t) for t in (FP64, FP32, FP16, BF16)}
    for name, reference in runs[FP64].items():
        errors = [(runs[t][name].double() - reference).abs().max() for t in (FP32, FP16, BF16)]
        assert 0 < errors[0] < 1e-4 < errors[1] < errors[2] < 0.3, (name, errors)


@pytest.mark.parametrize("problem", SMOKE + VARLEN[:6], ids=str)
def test_every_row_has_a_finite_oracle(problem: Problem) -> None:
    results = oracle_results(problem, problem.tensors(), FP64)
    assert not any(x.isnan().any() for x in results.values())
    assert all(x.isfinite().all() for name, x in results.items() if name != "lse")


def test_unused_cache_slots_never_reach_the_oracle() -> None:
    for problem in KVCACHE:
        results = oracle_cache_results(problem, FP64)
        assert results["out"].isfinite().all(), problem


def test_ids_are_unique_and_tensors_repeat() -> None:
    for rows in (CORE, DROPOUT, VARLEN, KVCACHE, FA3, FA3_KVCACHE):
        assert [name for name, count in Counter(map(str, rows)).items() if count > 1] == []
    for problem in (CORE[1], VARLEN[0]):
        first, second = problem.tensors(), problem.tensors()
        assert all(torch.equal(a, b) for a, b in zip(first.leaves, second.leaves))
    first, second = KVCACHE[0].tensors(), KVCACHE[0].tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("layout", "stride", "offset"),
    [
        ("plain", (60, 12, 4, 1), 0),
        ("headsfirst", (60, 4, 20, 1), 0),
        ("seqfirst", (12, 24, 4, 1), 0),
        ("lastdim", (60, 12, 1, 3), 0),
        ("sliced", (180, 36, 12, 1), 0),
        ("misaligned", (60, 12, 4, 1), 3),
        ("huge", (2**31 + 64, 12, 4, 1), 0),
    ],
)
def test_layouts_move_values_not_change_them(layout: str, stride: tuple, offset: int) -> None:
    x = randn(2, 5, 3, 4).to(BF16)
    placed = place(x, layout)
    assert torch.equal(placed, x)
    assert (placed.stride(), placed.storage_offset()) == (stride, offset)


def test_check_rejects_what_breaks_the_rule() -> None:
    reference = torch.tensor([1.0, 2.0, math.inf], dtype=FP64)
    low = torch.tensor([1.0, 2.01, math.inf])
    assert check("fine", torch.tensor([1.0, 2.019, math.inf]), reference, low) < 1
    for bad, message in [
        ([1.0, 2.03, math.inf], r"error 3.000e-02 at \(1,\)"),
        ([1.0, math.nan, math.inf], r"first at \(1,\): got nan, expected 2"),
        ([1.0, 2.0, -math.inf], r"first at \(2,\): got -inf, expected inf"),
        ([1.0, 2.0, 3.0], r"first at \(2,\): got 3.0, expected inf"),
    ]:
        with pytest.raises(AssertionError, match=message):
            check("bad", torch.tensor(bad), reference, low)
    with pytest.raises(AssertionError, match="shapes"):
        check("bad", torch.ones(2), reference, low)


def test_poisoned_memory_is_nan_inside_and_restored_after() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
