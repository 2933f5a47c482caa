"""The decode kernels on a CPU: shim, host library and device code, as in `test_emulated.py`.

Cases are cache rows: the whole list of them runs on a GPU (`test_kvcache.py`). Two multiprocessors
have two shares, so that all sequences stand in a line, and a share has the end of one, then others.
"""

from __future__ import annotations

import pytest
from emulated import DECODE_HEAD_DIMS, answers, build_driver
from native_tools import Stub, codegen, lines_of

PROGRAM = """
import flash_attn, flash_attn_interface
from cache_problem import CacheProblem
from flash_attn import backends
from problem_types import BF16
from running import assert_cache_follows_rule, published_cache_results
import torch

backends._backend_for = lambda problem, name: cuda

def step(module=flash_attn, **row):
    problem = CacheProblem(dtype=BF16, **row)
    assert_cache_follows_rule(problem, published_cache_results(problem, "cpu", module))

def fa3(**row):
    step(flash_attn_interface, **row)
"""
CASES = {
    "whole": "step(d={d}, seqlens=None, capacity=1100)",
    "ragged": "step(d={d}, b=5, capacity=700, seqlens=(700, 1, 0, 130, 64))",
    "without_keys": "step(d={d}, seqlens=(0, 0))",
    "many_sequences": "step(d={d}, b=43, capacity=90, seqlens=tuple(range(3, 89, 2)))",
    "long_line": "step(d={d}, b=5, capacity=1500, seqlens=(1500, 900, 0, 1499, 1100))",
    "one_head": "step(d={d}, hq=16, hk=1, seqlens=(300, 31), capacity=300)",
    "causal_rows": "step(d={d}, sq=5, causal=True, seqlens=(200, 3), capacity=256)",
    "many_rows": "step(d={d}, alibi='bh', sq=16, causal=True, seqlens=(200, 90), capacity=256,"
    " hq=8)",
    "window": "step(d={d}, sq=3, window=(70, 0), seqlens=(400, 30), capacity=400)",
    "window_both": "step(d={d}, sq=4, window=(100, 1), seqlens=(400, 30), capacity=400)",
    "chunk": "fa3(d={d}, sq=4, attention_chunk=100, seqlens=(310, 99), capacity=400)",
    "softcap": "step(d={d}, softcap=15.0, sq=2)",
    "alibi": "step(d={d}, alibi='bh', sq=5, causal=True, hq=8)",
    "negative_scale": "step(d={d}, softmax_scale=-0.2)",
    "pages": "step(d={d}, page=16, capacity=700, seqlens=(699, 300), sq=2, causal=True)",
    "pages_of_many_rows": "step(d={d}, page=5, sq=16, causal=True, seqlens=(90, 61), hq=8)",
    "odd_pages": "step(d={d}, page=5, capacity=300, seqlens=(299, 17))",
    "pages_of_one": "step(d={d}, page=1, capacity=130, seqlens=(130, 0))",
    "append": "step(d={d}, sq=3, s_new=3, causal=True, seqlens=(200, 0), capacity=300)",
    "append_interleaved": "step(d={d}, sq=3, s_new=3, causal=True, rotary_dim=32)",
    "append_half": "step(d={d}, sq=3, s_new=3, causal=True, rotary_dim=48, interleaved=False)",
    "append_pages": "step(d={d}, page=16, sq=2, s_new=20, seqlens=(61, 90), capacity=200)",
    "append_more_than_seen": "step(d={d}, s_new=9, window=(2, 0), seqlens=(61, 90))",
    "append_leftpad": "step(d={d}, leftpad=(5, 61), sq=4, s_new=4, causal=True, rotary_dim=32)",
    "append_packed": "fa3(d={d}, b=3, seqlens=(3, 70, 97), lens_new=(2, 0, 5), sq=2)",
    "rows_of_cache": "step(d={d}, b=3, seqlens=(3, 40, 97), batch_idx=(4, 0, 2), s_new=1)",
    "packed_queries": "fa3(d={d}, b=4, seqlens=(3, 40, 97, 5), lens_q=(1, 0, 4, 2), causal=True)",
    "unsplit": "step(d={d}, num_splits=1, capacity=700, seqlens=(680, 3))",
    "splits": "step(d={d}, num_splits=3, capacity=700, seqlens=(680, 3), sq=2)",
    "narrow_v": "step(d={d}, dv={d} - 24, s_new=1)",
    "odd_head_dim": "step(d={d} - 8, s_new=2, sq=2, causal=True)",
    "unaligned_head_dim": "step(d={d} - 5, s_new=2, sq=2, causal=True)",
}
EARLIER_HEAD_DIMS = (96, 128)  # whose tiles are others on Hopper
# On a device of twelve multiprocessors. One sequence: clusters of two to eight CTAs, three of them
# for a long head. Lengths leave clusters without work, and CTAs of a cluster. Several sequences use
# clusters if they are short, or about as long as one another; else each is cut by itself, or, if
# too many CTAs would be idle, the line is.
PARTS = {
    "long": "step(d={d}, b=1, hq=2, hk=1, seqlens=(2300,), capacity=2300)",
    "uneven": "step(d={d}, b=1, hq=6, hk=2, seqlens=(931,), capacity=2300, sq=2, causal=True)",
    "one_cluster": "step(d={d}, b=1, hq=16, hk=1, seqlens=(200,), capacity=2300)",
    "half_of_one": "step(d={d}, b=1, hq=4, hk=1, seqlens=(100,), capacity=2300)",
    "one_block": "step(d={d}, b=1, hq=4, hk=2, seqlens=(7,), capacity=2300)",
    "without_keys": "step(d={d}, b=1, seqlens=(0,), capacity=2300)",
    "short_cache": "step(d={d}, b=1, hq=2, hk=1, seqlens=(700,), capacity=701)",
    "many_rows": "step(d={d}, alibi='bh', b=1, hq=16, hk=1, sq=4, causal=True, seqlens=(900,),"
    " capacity=2300)",
    "append": "step(d={d}, b=1, s_new=3, sq=3, causal=True, rotary_dim=32, capacity=2300,"
    " seqlens=(1601,))",
    "pages": "step(d={d}, b=1, page=16, s_new=1, seqlens=(1777,), capacity=2300)",
    "narrow_v": "step(d={d}, dv={d} - 24, b=1, hk=1, seqlens=(1700,), capacity=2300)",
    "several": "step(d={d}, b=3, hq=4, hk=1, seqlens=(1100, 1087, 1120), capacity=1200)",
    "several_ragged": "step(d={d}, b=3, hq=4, hk=1, seqlens=(1100, 0, 620), capacity=1200)",
    "several_short": "step(d={d}, b=3, hq=16, hk=1, seqlens=(70, 65, 128), capacity=1200)",
    "several_pages": "step(d={d}, b=2, hq=6, hk=3, page=16, s_new=2, sq=2, causal=True,"
    " seqlens=(400, 412), capacity=1200)",
    "apart": "step(d={d}, b=4, hq=4, hk=1, seqlens=(1900, 130, 0, 1000), capacity=2600)",
    "apart_heads": "step(d={d}, b=4, hq=4, hk=2, sq=3, causal=True, seqlens=(700, 1500, 400, 90),"
    " capacity=1600)",
    "apart_append": "step(d={d}, b=5, hk=1, page=16, s_new=2, seqlens=(900, 30, 1200, 7, 600),"
    " capacity=2600)",
    "apart_many": "step(d={d}, b=11, hq=2, hk=1, seqlens=tuple(range(50, 600, 50)), capacity=1600)",
    "line": "step(d={d}, b=7, hq=2, hk=1, seqlens=(2500,) * 7, capacity=2600)",
}


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, launched = answers(machine, log, PROGRAM, CASES, DECODE_HEAD_DIMS)
    narrow = {f"flash_fwd_decode_d{d}_bf16" for d in DECODE_HEAD_DIMS}
    wide = {f"flash_fwd_decode_wide_d{d}_bf16" for d in DECODE_HEAD_DIMS}
    assert launched == narrow | wide | {"flash_fill_bf16"}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", DECODE_HEAD_DIMS)
def test_decode_kernels_compute_attention(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""


@pytest.fixture(scope="module")
def told_of_earlier(
    machine: Stub, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """What each case came to in tiles of GPUs before Hopper: four warps, two CTAs an SM."""
    folder = tmp_path_factory.mktemp("earlier")
    kinds = ("decode", "fill")
    units = [x for x in codegen.units() if x.kind in kinds and x.dtype == "bf16"]
    build_driver(folder, [x for x in units if x.head_dim in (0, *EARLIER_HEAD_DIMS)], arch=80)
    log = folder / "log"
    driver = Stub(folder)
    results, launched = answers(
        machine, log, PROGRAM, CASES, EARLIER_HEAD_DIMS, driver=driver, arch=80
    )
    assert {f"flash_fwd_decode_d{d}_bf16" for d in EARLIER_HEAD_DIMS} <= launched
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", EARLIER_HEAD_DIMS)
def test_decode_kernels_of_earlier_gpus_compute_attention(
    told_of_earlier: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told_of_earlier[d, name] == ""


@pytest.fixture(scope="module")
def told_of_parts(
    machine: Stub, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """What each case of parts came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, _ = answers(machine, log, PROGRAM, PARTS, DECODE_HEAD_DIMS, num_sms=12)
    assert {line.split()[2] for line in lines_of(log, "cluster")} == {"2", "4", "8"}
    return results


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("d", DECODE_HEAD_DIMS)
def test_parts_are_merged(told_of_parts: dict[tuple[int, str], str], d: int, name: str) -> None:
    assert told_of_parts[d, name] == ""
