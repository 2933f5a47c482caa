"""The kernels of every GPU from compute capability 8.0 on, on a CPU, as `test_emulated.py` has
Hopper's: through the published functions, forward and backward.
"""

from __future__ import annotations

import pytest
from emulated import answers, build_driver
from native_tools import Stub, codegen

PROGRAM = """
import flash_attn, flash_attn_interface
from cache_problem import CacheProblem
from dropout_oracle import keep_mask
from flash_attn import backends
from problem_types import BF16, Problem, varlen
from running import (
    assert_cache_follows_rule, assert_follows_rule, published_cache_results, published_results
)

backends._backend_for = lambda problem, name: cuda

def follow(problem, module=flash_attn):
    tensors, mask = problem.tensors(), None
    torch.manual_seed(3)
    got = published_results(problem, tensors, module)
    if problem.dropout_p > 0:
        torch.manual_seed(3)
        mask = keep_mask(problem, torch.zeros(2, dtype=torch.int64).random_())
    got.pop("S_dmask", None)
    assert_follows_rule(problem, got, dropout_mask=mask)

def dense(**row):
    follow(Problem(dtype=BF16, **row))

def packed(lens_q, lens_k, **row):
    follow(varlen(lens_q, lens_k, dtype=BF16, **row), flash_attn_interface)

def dropped(lens_q, lens_k, **row):
    follow(varlen(lens_q, lens_k, dtype=BF16, dropout_p=0.4, **row))

def in_use(d):
    # Rows of a batch behind those in use hold anything, have out 0, and the others do not see them.
    q, k = torch.randn(2, 70, 2, d, dtype=BF16), torch.randn(2, 90, 1, d, dtype=BF16)
    rows, keys = (70, 30), (50, 90)
    alone = [flash_attn_interface.flash_attn_func(q[i : i + 1, :n], *[k[i : i + 1, :m]] * 2)
             for i, (n, m) in enumerate(zip(rows, keys))]
    for i, (n, m) in enumerate(zip(rows, keys)):
        q[i, n:] = k[i, m:] = math.nan
    used = [torch.tensor(x, dtype=torch.int32) for x in (rows, keys)]
    out, lse, *_ = flash_attn_interface._flash_attn_forward(
        q, k, k, seqused_q=used[0], seqused_k=used[1])
    for i, n in enumerate(rows):
        assert torch.equal(out[i : i + 1, :n], alone[i])
        assert bool((out[i, n:] == 0).all() and (lse[i, :, n:] == math.inf).all())

def chunk(**row):
    problem = CacheProblem(dtype=BF16, **row)
    assert_cache_follows_rule(problem, published_cache_results(problem, "cpu", flash_attn))
"""
CASES = {
    "one_row": "dense(d={d}, sq=1, sk=1)",
    "below_a_block": "dense(d={d}, sq=63, sk=65)",
    "ragged": "dense(d={d}, sq=129, sk=200, hq=4, hk=2)",
    "whole_blocks": "dense(d={d}, sq=128, sk=256, b=1)",
    "rows_in_use": "in_use({d})",
    "causal": "dense(d={d}, sq=150, sk=150, hq=4, hk=2, causal=True)",
    "causal_more_keys": "dense(d={d}, sq=65, sk=300, causal=True)",
    "rows_without_keys": "dense(d={d}, sq=200, sk=70, causal=True)",
    "keys_without_rows": "dense(d={d}, sq=70, sk=400, b=1, window=(64, -1))",
    "window": "dense(d={d}, sq=200, sk=250, b=1, window=(70, 30))",
    "softcap": "dense(d={d}, sq=100, sk=130, softcap=10.0, causal=True)",
    "alibi": "dense(d={d}, sq=100, sk=130, alibi='bh')",
    "all_rules": "dense(d={d}, sq=100, sk=130, alibi='h', softcap=10.0, window=(60, 0))",
    "negative_scale": "dense(d={d}, sq=70, sk=130, softmax_scale=-0.2)",
    "deterministic": "dense(d={d}, sq=130, sk=400, hq=4, hk=2, deterministic=True)",
    "dropout": "dense(d={d}, sq=130, sk=150, hq=4, hk=2, dropout_p=0.3)",
    "dropout_causal": "dense(d={d}, sq=130, sk=130, causal=True, dropout_p=0.5)",
    "dropout_packed": "dropped((70, 1, 130), (90, 5, 130), d={d}, causal=True)",
    "narrow_v": "dense(d={d}, dv={d} - 24, sq=70, sk=130)",
    "odd_head_dim": "dense(d={d} - 5, sq=70, sk=130, causal=True)",
    "packed": "packed((100, 0, 129, 1), (64, 50, 200, 257), d={d}, hq=4, hk=2)",
    "packed_causal": "packed((130, 5, 100), (130, 200, 50), d={d}, causal=True)",
    "packed_used": "packed((130, 5, 100), (130, 200, 50), used_q=(130, 0, 33),"
    " used_k=(1, 190, 0), d={d})",
    "chunk": "chunk(d={d}, hq=8, hk=2, sq=70, seqlens=(200, 90), capacity=260, causal=True)",
    "chunk_in_pages": "chunk(d={d}, hq=8, hk=2, sq=70, page=16, seqlens=(190, 90), capacity=256)",
    "chunk_in_odd_pages": "chunk(d={d}, hq=8, hk=2, sq=70, page=5, seqlens=(90, 61))",
    "chunk_that_appends": "chunk(d={d}, hq=8, hk=2, sq=40, s_new=40, causal=True, rotary_dim=32,"
    " seqlens=(100, 0), capacity=200)",
    "chunk_in_parts": "chunk(d={d}, hq=8, hk=2, sq=70, seqlens=(400, 300), capacity=420,"
    " num_splits=3)",
}
# Panels of 64 columns, and of 32; two; a part of Q in registers, and one buffer of K and V.
HEAD_DIMS = (64, 96, 128, 256)


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    folder = tmp_path_factory.mktemp("sm80")
    around = ("combine", "append", "delta", "s_dmask", "fill")
    units = [
        unit
        for unit in codegen.units()
        if unit.dtype == "bf16"
        and ((unit.family == "sm80" and unit.head_dim in HEAD_DIMS) or unit.kind in around)
    ]
    build_driver(folder, units, arch=80)
    driver = Stub(folder)
    results, launched = answers(
        machine, folder / "log", PROGRAM, CASES, HEAD_DIMS, driver=driver, arch=80
    )
    assert launched == {unit.symbol for unit in units}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_kernels_of_earlier_gpus_compute_attention(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""
