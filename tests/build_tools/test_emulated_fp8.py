"""Hopper's FP8 kernels on a CPU, as test_emulated.py runs those for 16 bits."""

from __future__ import annotations

import pytest
from emulated import FORWARD_CASES, HEAD_DIMS, answers
from native_tools import Stub

PROGRAM = """
from oracle import varlen_attention
E4M3 = torch.float8_e4m3fn
BF16 = torch.bfloat16

def fp8(*shape):
    return torch.randn(shape).to(E4M3)

def call(q, k, v, descale, cu=(None, None), used=(None, None), max_seqlens=(None, None),
         scale=None, causal=False, window=(-1, -1), attention_chunk=0, softcap=0.0, slopes=None):
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=BF16)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    right = 0 if causal else window[1]
    result = torch.ops.flash_attn_cuda.forward.default.redispatch(
        CUDA, q, k, v, None, out, *[None] * 6, True, *cu, *used, None, None, None, *max_seqlens,
        scale, window[0], right, attention_chunk, softcap, slopes, 0.0, None, False, 1,
        *descale.values())
    return result[:2]

def judge(got, oracle):
    exact, rough = oracle(dtype=torch.float64), oracle(dtype=BF16, p_dtype=E4M3)
    check("out", got[0], exact[0], rough[0])
    check("lse", got[1], exact[1], rough[1], atol=1e-4)

def descales(b, hk, is_given=True):
    names = ("q_descale", "k_descale", "v_descale")
    return {name: torch.rand(b, hk) + 0.5 if is_given else None for name in names}

def dense(d, sq, sk, hq=2, hk=1, b=2, rise=0.0, sign=1.0, dv=None, descaled=True, **options):
    q, k, v = fp8(b, sq, hq, d), fp8(b, sk, hk, d), fp8(b, sk, hk, dv or d)
    if rise:  # scores that grow from block to block
        q[..., 0] = torch.tensor(8.0 * sign).to(E4M3)
        k[..., 0] = torch.linspace(rise, 0, sk).to(E4M3)[:, None]
    factors = descales(b, hk, descaled)
    kept = dict(options, **factors)
    kept["alibi_slopes"] = kept.pop("slopes", None)
    kept["softmax_scale"] = kept.pop("scale", None)
    judge(call(q, k, v, factors, **options), lambda **how: attention(q, k, v, **how, **kept)[:2])

def packed(d, lens_q, lens_k, hq=2, hk=1, used_k=None, **options):
    cu = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
          for x in (lens_q, lens_k)]
    # Keys behind the last sequence, and behind those in use, hold anything.
    q, k, v = fp8(sum(lens_q) + 3, hq, d), fp8(sum(lens_k) + 5, hk, d), fp8(sum(lens_k) + 5, hk, d)
    used = None if used_k is None else torch.tensor(used_k, dtype=torch.int32)
    ends = cu[1][:-1] + used if used_k else cu[1][1:]
    unused = torch.ones(len(k), dtype=torch.bool)
    for start, end in zip(cu[1], ends):
        unused[start:end] = False
    k.view(torch.uint8)[unused] = v.view(torch.uint8)[unused] = 0x7F  # NaN
    factors = descales(len(lens_q), hk)
    got = call(q, k, v, factors, cu, (None, used), (max(lens_q), max(lens_k)), **options)
    rows = slice(0, sum(lens_q))
    assert bool((got[0][rows.stop:] == 0).all())
    def oracle(**how):
        return varlen_attention(
            q[rows], k, v, *cu, seqused_k=used, **how, **factors, **options)[:2]
    judge((got[0][rows], got[1][:, rows]), oracle)
"""
CASES = {
    **FORWARD_CASES,
    "many_keys": "dense({d}, 70, 2100, b=1)",
    "many_keys_causal": "dense({d}, 300, 2100, b=1, causal=True)",
    "many_keys_window": "dense({d}, 260, 2100, b=1, hq=1, window=(700, 40))",
    "many_keys_packed": "packed({d}, [130, 1, 260], [2100, 300, 1141], hq=1, causal=True)",
    "many_keys_used": "packed({d}, [130, 40], [2100, 1200], hq=1, used_k=[1137, 900])",
    "no_descale": "dense({d}, 100, 200, descaled=False)",
    "negative_scores": "dense({d}, 200, 300, rise=100.0, sign=-1.0)",
}


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, launched = answers(machine, log, PROGRAM, CASES)
    forward = {f"flash_fwd_sm90_fp8_d{d}_e4m3" for d in HEAD_DIMS}
    forward |= {f"flash_fwd_sm90_fp8_scored_d{d}_e4m3" for d in HEAD_DIMS}
    assert launched == forward | {"flash_fwd_sm90_fp8_wide_d128_e4m3", "flash_fill_bf16"}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_hoppers_fp8_kernels_compute_attention(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""
