"""What only the CUDA kernels have: threads and streams, indices that nobody checked, splits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cache_problem import CacheProblem
from compare import check, poisoned_memory
from oracle import attention, varlen_attention
from problem_types import BF16, FP16, FP64, Problem, cumulative, varlen
from running import (
    assert_cache_follows_rule,
    assert_follows_rule,
    published_cache_results,
    published_results,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn
import flash_attn_interface as fa3
from flash_attn._rotary import rotate

pytestmark = pytest.mark.gpu

ROW = Problem(sq=200, sk=300, hq=4, hk=2, d=64, dtype=BF16, causal=True)
OUTSIDE = 2_147_480_000  # an index that no cache has


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


# --- Threads, streams, graphs -------------------------------------------------------------------


def test_a_threads_first_work_may_be_a_call_or_its_backward() -> None:
    expected = published_results(ROW, ROW.tensors("cuda"), flash_attn)
    results: list[Any] = []
    tensors = ROW.tensors("cuda")
    out = flash_attn.flash_attn_func(*(x.requires_grad_() for x in tensors.leaves), causal=True)
    threads = [
        threading.Thread(
            target=lambda: results.append(
                flash_attn.flash_attn_func(*tensors.leaves, causal=True).detach()
            )
        ),
        threading.Thread(
            target=lambda: results.append(torch.autograd.grad(out, tensors.leaves, tensors.dout)[1])
        ),
    ]
    for thread in threads:
        thread.start()
        thread.join()
    assert torch.equal(results[0], expected["out"])
    assert torch.equal(results[1], expected["dk"])


def test_work_is_queued_on_the_callers_stream() -> None:
    tensors = ROW.tensors("cuda")
    expected = flash_attn.flash_attn_func(*tensors.leaves, causal=True)
    late = [torch.zeros_like(x) for x in tensors.leaves]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, source in zip(late, tensors.leaves):
            x.copy_(source)
        out = flash_attn.flash_attn_func(*late, causal=True)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_a_graph_replays_forward_backward_and_a_growing_cache() -> None:
    tensors = ROW.tensors("cuda")
    leaves = [x.clone().requires_grad_() for x in tensors.leaves]
    caches = [torch.zeros(2, 64, 2, 64, dtype=BF16, device="cuda") for _ in range(2)]
    q, new = (torch.zeros(2, 1, h, 64, dtype=BF16, device="cuda") for h in (4, 2))
    lens = int32(0, 30)

    def step() -> tuple[Tensor, ...]:
        out = flash_attn.flash_attn_func(*leaves, causal=True, deterministic=True)
        decoded = flash_attn.flash_attn_with_kvcache(q, *caches, new, new, cache_seqlens=lens)
        lens.add_(1)
        # Detached: kept graphs of a captured call would tie the leaves to its stream.
        return (out.detach(), *torch.autograd.grad(out, leaves, tensors.dout), decoded)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lens.copy_(int32(0, 30))
    with torch.no_grad():
        for x in (*leaves, q, new):
            x.copy_(torch.randn_like(x))
    for _ in range(3):
        graph.replay()
    replayed = [x.clone() for x in captured]
    assert lens.tolist() == [3, 33]
    for cache in caches:
        assert torch.equal(cache[:, :3][0], new[0].expand(3, -1, -1))
    lens.copy_(int32(2, 32))
    assert all(torch.equal(a, b) for a, b in zip(step(), replayed))


def test_shared_tiles_are_counted_anew_by_every_replay_and_stream() -> None:
    # More tiles than multiprocessors: on Hopper, CTAs take them by a counter in memory.
    q, k, v = (torch.randn(4, 1024, 16, 64, device="cuda", dtype=BF16) for _ in range(3))

    def attend() -> Tensor:
        out: Tensor = flash_attn.flash_attn_func(q, k, v, causal=True)
        return out

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for _ in range(3):
        q.normal_()
        graph.replay()
        assert torch.equal(captured, attend())
    expected = attend()
    torch.cuda.synchronize()
    outs = []
    for stream in [torch.cuda.Stream() for _ in range(4)] * 8:
        with torch.cuda.stream(stream):
            outs.append(attend())
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


# --- Determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_varlen", [False, True])
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_call_that_nobody_watches_has_the_published_results(is_varlen: bool) -> None:
    x = torch.randn(2, 96, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cu = int32(0, 96, 192)

    def run() -> tuple[Tensor, Tensor]:
        if is_varlen:
            rows = x.flatten(0, 1)
            out = flash_attn.flash_attn_varlen_func(rows, rows, rows, cu, cu, 96, 96, causal=True)
        else:
            out = flash_attn.flash_attn_func(x, x, x, causal=True)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        unwatched = run()
    with Watcher():
        watched = run()
    names = {event.key for event in profile.key_averages()}
    op = "_flash_attn_varlen_forward" if is_varlen else "_flash_attn_forward"
    assert f"flash_attn_cuda::{op}" in names
    assert f"flash_attn::{op}" not in names
    assert torch.equal(unwatched[0], watched[0])
    # Sums of dQ have no fixed order.
    torch.testing.assert_close(unwatched[1], watched[1], rtol=2e-2, atol=2e-2)


def assert_repeats(call: Callable[[], Sequence[Tensor]], times: int) -> None:
    """All results of so many calls are the same bits."""

    def bits() -> list[Tensor]:
        return [x.view({2: torch.int16, 4: torch.int32}[x.element_size()]) for x in call()]

    expected = bits()
    changed = torch.zeros(len(expected), dtype=torch.bool, device="cuda")
    for _ in range(times - 1):
        changed |= torch.stack([(x != y).any() for x, y in zip(bits(), expected)])
    assert not changed.any(), changed.tolist()


@pytest.mark.parametrize("low", [0.0, -120.0])
@pytest.mark.parametrize("sizes", [(200, 1500), (4100, 4200)])
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_scores_that_rise_from_block_to_block(d: int, sizes: tuple[int, int], low: float) -> None:
    sq, sk = sizes
    problem = Problem(sq=sq, sk=sk, b=1, hq=8, hk=8, d=d, dtype=BF16)
    q, k, v = problem.tensors("cuda").leaves
    # Keys are read from the last to the first.
    q[..., 0], k[..., 0] = d**0.5, torch.linspace(low + sk / 15, low, sk).to(BF16)[:, None]
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    with torch.device("cuda"):
        exact, rough = (attention(q, k, v, dtype=dtype) for dtype in (FP64, BF16))
    for name, got, reference, low_precision in zip(("out", "lse"), (out, lse), exact, rough):
        check(name, got, reference, low_precision)


# More tiles than multiprocessors, the last one of a sequence ragged.
REPEATED = Problem(b=4, sq=1000, sk=1200, hq=8, hk=2, dtype=BF16, causal=True)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_forward_repeats_bit_by_bit(d: int) -> None:
    leaves = replace(REPEATED, d=d).tensors("cuda").leaves
    assert_repeats(
        lambda: flash_attn.flash_attn_func(*leaves, causal=True, return_attn_probs=True)[:2], 1000
    )


@pytest.mark.parametrize("sq", [512, 1000, 1100])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_packed_calls_have_the_bits_of_dense_ones(d: int, sq: int) -> None:
    # Of which some run in pairs of CTAs on Hopper.
    q, k, v = replace(REPEATED, d=d, sq=sq).tensors("cuda").leaves
    dense = flash_attn.flash_attn_func(q, k, v, causal=True)
    starts = [torch.arange(len(x) + 1, device="cuda").int() * x.shape[1] for x in (q, k)]
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    out = flash_attn.flash_attn_varlen_func(*packed, *starts, q.shape[1], k.shape[1], causal=True)
    assert torch.equal(out.view_as(dense), dense)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_repeats_bit_by_bit(d: int, deterministic: bool) -> None:
    tensors = replace(REPEATED, d=d).tensors("cuda")
    leaves = [x.requires_grad_() for x in tensors.leaves]
    out = flash_attn.flash_attn_func(*leaves, causal=True, deterministic=deterministic)
    # Sums of dQ have no fixed order otherwise.
    wanted = leaves if deterministic else leaves[1:]
    assert_repeats(lambda: torch.autograd.grad(out, wanted, tensors.dout, retain_graph=True), 500)


# --- Indices and lengths that nobody checked ----------------------------------------------------


def test_a_page_outside_the_cache_is_neither_read_nor_written() -> None:
    problem = CacheProblem(dtype=BF16, page=16, sq=3, s_new=3, causal=True)
    good = published_cache_results(problem, "cuda", flash_attn)
    tensors = problem.tensors("cuda")
    for name in ("k_cache", "v_cache"):
        tensors[name].nan_to_num_(0.0)
    before = tensors["k_cache"].clone()
    # Sequence 0 appends to page 2 of its row.
    tensors["block_table"][0, 2] = OUTSIDE
    out = flash_attn.flash_attn_with_kvcache(**tensors, causal=True)
    assert out.isfinite().all()
    assert torch.equal(out[1], good["out"][1])
    tensors["block_table"][0, 2] = -1
    assert flash_attn.flash_attn_with_kvcache(**tensors, causal=True).isfinite().all()
    changed = (tensors["k_cache"] != before).flatten(1).any(1).nonzero().flatten().tolist()
    written = {int(tensors["block_table"][1, page]) for page in (97 // 16, 99 // 16)}
    assert set(changed) == written


def test_a_cache_row_that_does_not_exist_has_no_keys() -> None:
    problem = CacheProblem(b=3, dtype=BF16, seqlens=(3, 40, 97), batch_idx=(4, 0, 2), s_new=2, sq=2)
    good = published_cache_results(problem, "cuda", flash_attn)
    tensors = problem.tensors("cuda")
    before = tensors["k_cache"].nan_to_num(0.0)
    tensors["cache_batch_idx"] = int32(OUTSIDE, 0, -1)
    out, lse = flash_attn.flash_attn_with_kvcache(**tensors, return_softmax_lse=True)
    assert torch.equal(out[1], good["out"][1])
    assert (out[[0, 2]] == 0).all()
    assert (lse[[0, 2]] == torch.inf).all()
    changed = (tensors["k_cache"].nan_to_num(0.0) != before).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[0, 40], [0, 41]]


def test_lengths_beyond_the_cache_stop_at_its_end() -> None:
    problem = CacheProblem(b=4, dtype=BF16, capacity=64, seqlens=(62, 9, 9, 9), s_new=4, sq=2)
    tensors = problem.tensors("cuda")
    for name in ("k_cache", "v_cache"):
        tensors[name].nan_to_num_(0.0)
    before = tensors["k_cache"].clone()
    tensors["cache_seqlens"] = int32(62, OUTSIDE, -3, 2**31 - 2)
    out = flash_attn.flash_attn_with_kvcache(**tensors)
    assert out.isfinite().all()
    changed = (tensors["k_cache"] != before).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[0, 62], [0, 63], [2, 0]]


def test_a_position_behind_the_rotary_table_turns_as_its_last() -> None:
    problem = CacheProblem(dtype=BF16, rotary_dim=32, s_new=2, sq=2, seqlens=(40, 40))
    tensors = problem.tensors("cuda")
    table = {name: tensors[name][:40].contiguous() for name in ("rotary_cos", "rotary_sin")}
    flash_attn.flash_attn_with_kvcache(**{**tensors, **table})
    last = torch.full((2, 2), 39, device="cuda")
    expected = rotate(tensors["k"], *table.values(), last, interleaved=True)
    torch.testing.assert_close(tensors["k_cache"][:, 40:42], expected)


@pytest.mark.parametrize("starts", [(0, 5000, 7), (-9, 3, 2**31 - 1), (17, 3, 1)])
def test_offsets_that_make_no_sense_touch_nothing_outside(starts: tuple[int, ...]) -> None:
    tensors = varlen((17, 30), (33, 40), hq=4, hk=2, dtype=BF16).tensors("cuda")
    leaves = [x.requires_grad_() for x in tensors.leaves]
    cu_seqlens = int32(*starts)
    out = flash_attn.flash_attn_varlen_func(*leaves, cu_seqlens, cu_seqlens, 40, 40)
    gradients = torch.autograd.grad(out, leaves, tensors.dout)
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in (out, *gradients))


# --- Rows that no sequence uses -----------------------------------------------------------------


def test_keys_may_start_in_any_order_where_their_lengths_are_given() -> None:
    problem = varlen((20, 30, 9), (50, 40, 30), hq=4, hk=2, dtype=BF16, causal=True)
    tensors = problem.tensors("cuda")
    q, k, v = (x.requires_grad_() for x in tensors.leaves)
    starts, used = (90, 0, 45), (28, 40, 33)
    marks = int32(*starts, 10)
    with poisoned_memory():
        out, lse = fa3.flash_attn_varlen_func(
            q,
            k,
            v,
            tensors.cu_seqlens_q,
            marks,
            30,
            50,
            seqused_k=int32(*used),
            causal=True,
            return_attn_probs=True,
        )
        gradients = torch.autograd.grad(out, (q, k, v), tensors.dout)
    rows = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, used)])
    runs = []
    for dtype in (FP64, BF16):
        leaves = [x.detach().cpu().to(dtype).requires_grad_() for x in (q, k, v)]
        expected, expected_lse = varlen_attention(
            leaves[0],
            leaves[1][rows],
            leaves[2][rows],
            tensors.cu_seqlens_q.cpu(),
            cumulative(used, "cpu"),
            causal=True,
            dtype=dtype,
        )
        grads = torch.autograd.grad(expected, leaves, tensors.dout.cpu().to(dtype))
        runs.append((expected.detach(), expected_lse.detach(), *grads))
    names = ("out", "lse", "dq", "dk", "dv")
    for name, got, reference, low in zip(names, (out, lse, *gradients), *runs):
        check(name, got, reference, low)


def test_rows_behind_a_promised_maximum_are_zero() -> None:
    problem = varlen((50, 20), (50, 20), hq=4, hk=2, dtype=BF16)
    tensors = problem.tensors("cuda")
    with poisoned_memory():
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            *tensors.leaves,
            tensors.cu_seqlens_q,
            tensors.cu_seqlens_k,
            30,
            50,
            return_attn_probs=True,
        )
    assert (out[30:50] == 0).all()
    assert (lse[:, 30:50] == torch.inf).all()
    assert out.isfinite().all()


# --- Splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_splits", [0, 2, 7, 256])
def test_packed_queries_may_be_split(num_splits: int) -> None:
    problem = varlen(
        (17, 1, 40), (900, 0, 300), used_q=(11, 1, 40), used_k=(900, 0, 211), hq=4, hk=2, dtype=BF16
    )
    tensors = problem.tensors("cuda")
    with poisoned_memory():
        out, lse = fa3.flash_attn_varlen_func(
            *tensors.leaves,
            tensors.cu_seqlens_q,
            tensors.cu_seqlens_k,
            40,
            900,
            seqused_q=tensors.seqused_q,
            seqused_k=tensors.seqused_k,
            num_splits=num_splits,
            return_attn_probs=True,
        )
    assert_follows_rule(problem, {"out": out, "lse": lse}, backward=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "softcap": 20.0, "dtype": FP16},
        {"window": (300, 100)},
        {"alibi": "heads"},
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [40, 64, 96, 128, 192, 256])
def test_few_tiles_over_many_keys_are_split_by_themselves(d: int, options: dict[str, Any]) -> None:
    problem = Problem(**{"sq": 150, "sk": 3100, "hq": 4, "hk": 2, "d": d, "dtype": BF16, **options})
    with poisoned_memory():
        got = published_results(problem, problem.tensors("cuda"), flash_attn)
    assert_follows_rule(problem, got)


def test_many_queries_over_long_pages_are_split() -> None:
    problem = CacheProblem(
        dtype=BF16,
        capacity=4096,
        seqlens=(3900, 30),
        sq=100,
        s_new=100,
        causal=True,
        page=64,
        d=128,
    )
    assert_cache_follows_rule(problem, published_cache_results(problem, "cuda", flash_attn))


def test_a_long_cache_is_split_by_itself() -> None:
    problem = CacheProblem(
        dtype=FP16, capacity=8192, seqlens=(8000, 30), sq=2, s_new=2, causal=True, hq=8, d=128
    )
    assert_cache_follows_rule(problem, published_cache_results(problem, "cuda", flash_attn))


# --- Few queries of large groups, whose heads share tiles -----------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "softcap": 20.0, "dtype": FP16},
        {"window": (70, 10), "layout": "headsfirst"},
        {"sk": 4000},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "sizes",
    [(80, 8, 2), (33, 8, 1), (13, 16, 1), (5, 64, 1), (21, 12, 2), (20, 7, 1), (9, 10, 2)],
    ids=str,
)
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_heads_of_a_group_may_share_tiles(
    d: int, sizes: tuple[int, int, int], options: dict[str, Any]
) -> None:
    sq, hq, hk = sizes
    problem = Problem(**{"sq": sq, "sk": 300, "hq": hq, "hk": hk, "d": d, "dtype": BF16, **options})
    assert_follows_rule(problem, published_results(problem, problem.tensors("cuda"), flash_attn))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(17, 1, 0, 40, 21), (1, 1, 200, 3, 1)], ids=str)
def test_packed_heads_of_a_group_may_share_tiles(lengths: tuple[int, ...], causal: bool) -> None:
    problem = varlen(lengths, (900, 3, 370, 300, 21), hq=8, hk=1, causal=causal, dtype=BF16)
    assert_follows_rule(problem, published_results(problem, problem.tensors("cuda"), flash_attn))


def test_heads_that_share_tiles_read_pages() -> None:
    problem = CacheProblem(
        dtype=BF16,
        capacity=2048,
        seqlens=(1900, 30),
        sq=20,
        s_new=20,
        causal=True,
        hq=8,
        hk=1,
        page=64,
        d=128,
    )
    assert_cache_follows_rule(problem, published_cache_results(problem, "cuda", flash_attn))


# --- Operands that need a copy, and bounds that bound nothing -----------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        CacheProblem(dtype=BF16, sq=7, s_new=4, causal=True, hq=6, hk=1, d=59),
        CacheProblem(dtype=FP16, sq=2, s_new=3, d=20, rotary_dim=16, interleaved=False, page=16),
        CacheProblem(dtype=BF16, sq=2, s_new=3, d=72, rotary_dim=48, layout="misaligned"),
    ],
    ids=str,
)
def test_a_cache_that_kernels_cannot_write_grows_all_the_same(problem: CacheProblem) -> None:
    assert_cache_follows_rule(problem, published_cache_results(problem, "cuda", flash_attn))


@pytest.mark.parametrize("sizes", [(200, 300), (300, 200)])
def test_a_huge_window_is_none(sizes: tuple[int, int]) -> None:
    problem = Problem(sq=sizes[0], sk=sizes[1], d=64, dtype=BF16)
    tensors = problem.tensors("cuda")
    expected = flash_attn.flash_attn_func(*tensors.leaves)
    for huge in (sys.maxsize, 2**31 - 1):
        out = flash_attn.flash_attn_func(*tensors.leaves, window_size=(huge, huge))
        assert torch.equal(out, expected)
