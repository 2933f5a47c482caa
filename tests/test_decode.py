"""Few queries over a long cache, on a GPU: shares that cut sequences, graphs, appended bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_problem import CacheProblem
from compare import check, poisoned_memory
from oracle import kvcache_attention
from problem_types import BF16, FP16, FP64
from running import assert_cache_follows_rule, published_cache_results
from torch import Tensor

import flash_attn

pytestmark = pytest.mark.gpu


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


LONG = {"capacity": 9000, "seqlens": (9000, 4111, 0, 64), "b": 4}
# On Hopper in clusters.
ONE = {"capacity": 9000, "b": 1}
# The same, if all are about as long.
MANY = {"capacity": 1000, "b": 16, "hq": 32, "hk": 8, "d": 128}


@pytest.mark.parametrize(
    "problem",
    [
        CacheProblem(**LONG, hq=8, hk=2, d=128, dtype=BF16),
        CacheProblem(**LONG, hq=8, hk=1, d=128, dtype=BF16, sq=5, causal=True),
        CacheProblem(**LONG, hq=4, hk=4, d=64, dtype=FP16, sq=16, causal=True),
        CacheProblem(**LONG, hq=8, hk=2, d=256, dtype=FP16, sq=9, causal=True, alibi="bh"),
        CacheProblem(**LONG, hq=8, hk=2, d=96, dtype=BF16, page=16, sq=2, window=(3000, 0)),
        CacheProblem(**LONG, hq=8, hk=2, d=192, dtype=BF16, page=1, softcap=20.0),
        CacheProblem(**LONG, hq=8, hk=2, d=128, dtype=BF16, num_splits=1),
        CacheProblem(**LONG, hq=8, hk=2, d=128, dtype=BF16, num_splits=6, sq=3, causal=True),
        CacheProblem(
            b=300, capacity=130, seqlens=tuple(i % 131 for i in range(300)), d=128, dtype=BF16
        ),
        CacheProblem(
            capacity=6000, seqlens=(5990, 100), s_new=7, sq=7, causal=True, d=128, dtype=BF16,
            rotary_dim=128, page=256,
        ),
        CacheProblem(**ONE, seqlens=(9000,), hq=8, hk=2, d=128, dtype=BF16),
        CacheProblem(**ONE, seqlens=(8999,), hq=16, hk=1, d=128, dtype=BF16),
        CacheProblem(**ONE, seqlens=(2200,), hq=8, hk=1, d=64, dtype=FP16, sq=5, causal=True),
        CacheProblem(**ONE, seqlens=(5000,), hq=8, hk=2, d=256, dtype=BF16, sq=9, causal=True),
        CacheProblem(**ONE, seqlens=(600,), hq=10, hk=5, d=96, dtype=BF16, page=16),
        CacheProblem(
            **ONE, seqlens=(8000,), hq=6, hk=3, d=192, dtype=BF16, s_new=3, sq=3, causal=True
        ),
        CacheProblem(b=1, capacity=1000, seqlens=(1000,), hq=8, hk=8, d=128, dtype=FP16),
        CacheProblem(**MANY, seqlens=tuple(range(985, 1001)), dtype=BF16),
        CacheProblem(**MANY, seqlens=tuple(range(0, 992, 62)), dtype=BF16),
    ],
    ids=str,
)  # fmt: skip
def test_shares_that_cut_sequences_give_what_whole_ones_do(problem: CacheProblem) -> None:
    for _ in range(3):  # the order in which parts arrive differs
        assert_cache_follows_rule(problem, published_cache_results(problem, "cuda", flash_attn))


@pytest.mark.parametrize("b", [1, 3])
def test_a_captured_call_follows_lengths_that_change(b: int) -> None:
    torch.manual_seed(5)
    q = torch.randn(b, 2, 8, 128, device="cuda", dtype=BF16)
    cache = [torch.randn(b, 5000, 2, 128, device="cuda", dtype=BF16) for _ in range(2)]
    lens = lengths(*[1] * b)

    def step() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = flash_attn.flash_attn_with_kvcache(
            q, *cache, cache_seqlens=lens, causal=True, return_softmax_lse=True
        )
        return result

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in ((5000, 64, 0), (0, 0, 0), (1030, 4999, 2048), (3, 5000, 5000)):
        lens.copy_(lengths(*values[:b]))
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        runs = []
        for dtype in (FP64, BF16):
            given = [x.cpu().to(dtype) for x in (q, *cache)]
            runs.append(
                kvcache_attention(*given, cache_seqlens=lens.cpu(), causal=True, dtype=dtype)
            )
        for name, got, reference, low in zip(("out", "lse"), captured, *runs):
            check(f"{values} {name}", got, reference, low)


@pytest.mark.parametrize("page", [0, 16, 48])
@pytest.mark.parametrize("interleaved", [True, False])
def test_an_append_on_the_way_writes_the_bits_of_one_before(page: int, interleaved: bool) -> None:
    # Many queries append by a kernel of its own.
    def cache_after(sq: int) -> list[Tensor]:
        problem = CacheProblem(
            b=3, capacity=300, seqlens=(130, 0, 279), s_new=20, d=128, dtype=BF16, page=page,
            rotary_dim=64, interleaved=interleaved,
        )  # fmt: skip
        tensors: dict[str, Any] = problem.tensors("cuda")
        tensors["q"] = tensors["q"].repeat(1, sq, 1, 1)
        for name in ("k_cache", "v_cache"):
            tensors[name].nan_to_num_(7.0)
        before = [tensors[name].clone() for name in ("k_cache", "v_cache")]
        with poisoned_memory():
            flash_attn.flash_attn_with_kvcache(**tensors, rotary_interleaved=interleaved)
        after = [tensors["k_cache"], tensors["v_cache"]]
        for old, new in zip(before, after):
            assert int((old != new).flatten(2).any(-1).sum()) == 3 * 20
        return after

    for fused, apart in zip(cache_after(1), cache_after(100)):
        assert torch.equal(fused, apart)


@pytest.mark.parametrize("lens", [LONG, {**ONE, "seqlens": (9000,)}], ids=["several", "one"])
def test_equal_calls_give_equal_bits(lens: dict[str, Any]) -> None:
    problem = CacheProblem(**lens, hq=8, hk=2, d=128, dtype=BF16, sq=3, causal=True)
    tensors = problem.tensors("cuda")
    runs = [flash_attn.flash_attn_with_kvcache(**tensors, causal=True) for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("lens", [LONG, {**ONE, "seqlens": (9000,)}], ids=["several", "one"])
def test_calls_of_two_streams_do_not_count_each_others_parts(lens: dict[str, Any]) -> None:
    problem = CacheProblem(**lens, hq=8, hk=2, d=128, dtype=BF16)
    tensors = problem.tensors("cuda")
    expected = flash_attn.flash_attn_with_kvcache(**tensors)
    torch.cuda.synchronize()
    outs = []
    for stream in [torch.cuda.Stream() for _ in range(4)] * 10:
        with torch.cuda.stream(stream):
            outs.append(flash_attn.flash_attn_with_kvcache(**tensors))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


def test_one_part_a_sequence_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(6)
    q = torch.randn(9, 1, 8, 128, device="cuda", dtype=BF16)
    k, v = (torch.randn(9, 3000, 2, 128, device="cuda", dtype=BF16) for _ in range(2))
    lens = lengths(*range(100, 2800, 300))

    def attend(rows: slice) -> Tensor:
        out: Tensor = flash_attn.flash_attn_with_kvcache(
            q[rows], k[rows], v[rows], cache_seqlens=lens[rows], num_splits=1
        )
        return out

    together = attend(slice(None))
    assert all(torch.equal(attend(slice(i, i + 1))[0], together[i]) for i in range(9))
