"""Decode kernels over an FP8 cache on a CPU, as test_emulated_decode.py runs those for 16 bits."""

from __future__ import annotations

import pytest
from emulated import FP8_DECODE_HEAD_DIMS, answers
from native_tools import Stub

PROGRAM = """
import flash_attn_interface
from cache_problem import CacheProblem
from flash_attn import backends
from problem_types import BF16, FP8, FP16
from running import assert_cache_follows_rule, published_cache_results

backends._backend_for = lambda problem, name: cuda

def step(factor=1.0, **row):
    row = {"dtype": BF16, "cache_dtype": FP8, "descale": True, **row}
    problem = Scaled(factor=factor, **row)
    got = published_cache_results(problem, "cpu", flash_attn_interface)
    assert_cache_follows_rule(problem, got)

class Scaled(CacheProblem):
    # Queries of sizes that no f16 has.
    def __init__(self, factor, **row):
        super().__init__(**row)
        object.__setattr__(self, "factor", factor)

    def tensors(self, device="cpu"):
        values = super().tensors(device)
        if self.factor != 1.0:
            values["q"] = values["q"] * self.factor
            values["q"][..., 1::2, :] = 0
        return values
"""
CASES = {
    "whole": "step(d={d}, seqlens=None, capacity=1100)",
    "ragged": "step(d={d}, b=5, capacity=700, seqlens=(700, 1, 0, 130, 64))",
    "no_descale": "step(d={d}, descale=False)",
    "fp16_queries": "step(d={d}, dtype=FP16, sq=2, causal=True)",
    "fp8_queries": "step(d={d}, dtype=FP8, cache_dtype=None, sq=3, causal=True)",
    "fp8_rows": "step(d={d}, dtype=FP8, cache_dtype=None, sq=16, hq=8, s_new=2, page=16)",
    "large_queries": "step(d={d}, factor=1e8, softmax_scale=1e-9, sq=2)",
    "small_queries": "step(d={d}, factor=1e-8, softmax_scale=1e7, hq=32, sq=3)",
    "one_head": "step(d={d}, hq=16, hk=1, seqlens=(300, 31), capacity=300)",
    "cluster": "step(d={d}, b=1, hq=4, hk=1, seqlens=(700,), capacity=701)",
    "many_rows": "step(d={d}, sq=16, causal=True, seqlens=(200, 90), capacity=256, hq=8)",
    "window": "step(d={d}, sq=3, window=(70, 0), seqlens=(400, 30), capacity=400)",
    "softcap": "step(d={d}, softcap=15.0, sq=2)",
    "alibi_like": "step(d={d}, softmax_scale=-0.2, sq=5, attention_chunk=30)",
    "pages": "step(d={d}, page=16, capacity=700, seqlens=(699, 300), sq=2, causal=True)",
    "pages_of_one": "step(d={d}, page=1, capacity=130, seqlens=(130, 0))",
    "leftpad": "step(d={d}, leftpad=(5, 61), sq=4, causal=True)",
    "append": "step(d={d}, sq=3, s_new=3, causal=True, seqlens=(200, 0), capacity=300)",
    "append_pages": "step(d={d}, page=16, sq=2, s_new=20, seqlens=(61, 90), capacity=200)",
    "append_packed": "step(d={d}, b=3, seqlens=(3, 70, 97), lens_new=(2, 0, 5), sq=2)",
    "rows_of_cache": "step(d={d}, b=3, seqlens=(3, 40, 97), batch_idx=(4, 0, 2), s_new=1)",
    "packed_queries": "step(d={d}, b=4, seqlens=(3, 40, 97, 5), lens_q=(1, 0, 4, 2), causal=True)",
    "splits": "step(d={d}, num_splits=3, capacity=700, seqlens=(680, 3), sq=2)",
    "narrow_v": "step(d={d}, dv={d} - 24, s_new=1)",
    "odd_head_dim": "step(d={d} - 8, s_new=2, sq=2, causal=True)",
    "unaligned_head_dim": "step(d={d} - 5, s_new=2, sq=2, causal=True)",
}  # fmt: skip


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, launched = answers(machine, log, PROGRAM, CASES, FP8_DECODE_HEAD_DIMS)
    narrow = {f"flash_fwd_decode_d{d}_e4m3" for d in FP8_DECODE_HEAD_DIMS}
    wide = {f"flash_fwd_decode_wide_d{d}_e4m3" for d in FP8_DECODE_HEAD_DIMS}
    assert launched == narrow | wide | {"flash_fill_bf16"}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", FP8_DECODE_HEAD_DIMS)
def test_decode_kernels_compute_attention_over_fp8(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""
