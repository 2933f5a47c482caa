"""Hopper's forward kernels on a CPU: shim, host library and device code, all but the GPU.

The emulator of `emulator/` runs the device code with copies and products that happen late and in
random order, so what is tested is masks, layouts, and which buffer may be touched when. A CTA gets
several tiles, because the device has only two multiprocessors, and heads come in sections of few,
because its L2 cache is small.
"""

from __future__ import annotations

import pytest
from emulated import FORWARD_CASES, HEAD_DIMS, answers
from native_tools import Stub

PROGRAM = """
from oracle import varlen_attention

def call(q, k, v, cu=(None, None), used=(None, None), max_seqlens=(None, None), leftpad=None,
         scale=None, causal=False, window=(-1, -1), attention_chunk=0, softcap=0.0, slopes=None):
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=DTYPE)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    right = 0 if causal else window[1]
    result = torch.ops.flash_attn_cuda.forward.default.redispatch(
        CUDA, q, k, v, out, *[None] * 6, True, *cu, *used, leftpad, None, None, *max_seqlens,
        scale, window[0], right, attention_chunk, softcap, slopes, 0.0, None, False, 1)
    return result[:2]

def judge(got, oracle):
    exact, rough = oracle(torch.float64), oracle(DTYPE)
    check("out", got[0], exact[0], rough[0])
    check("lse", got[1], exact[1], rough[1], atol=1e-4)

def dense(d, sq, sk, hq=2, hk=1, b=2, rise=0.0, jump=0.0, dv=None, **options):
    q, k, v = make(b, sq, hq, d), make(b, sk, hk, d), make(b, sk, hk, dv or d)
    if rise or jump:
        q[..., 0] = 8.0
    if rise:  # scores that grow from block to block
        k[..., 0] = torch.linspace(rise, 0, sk).to(DTYPE)[:, None]
    if jump:  # scores of which the first block tells nothing
        k[..., 0] = (jump * (torch.arange(sk) < sk - 150)).to(DTYPE)[:, None]
    kept = dict(options)
    kept["alibi_slopes"] = kept.pop("slopes", None)
    kept["softmax_scale"] = kept.pop("scale", None)
    judge(call(q, k, v, **options), lambda dtype: attention(q, k, v, dtype=dtype, **kept)[:2])

def packed(d, lens_q, lens_k, hq=2, hk=1, used_k=None, **options):
    cu = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
          for x in (lens_q, lens_k)]
    # Rows behind the last sequence, and behind those in use, hold anything.
    rows = sum(lens_k) + 5
    q, k, v = make(sum(lens_q) + 3, hq, d), make(rows, hk, d), make(rows, hk, d)
    used = None if used_k is None else torch.tensor(used_k, dtype=torch.int32)
    ends = cu[1][:-1] + used if used_k else cu[1][1:]
    unused = torch.ones(len(k), dtype=torch.bool)
    for start, end in zip(cu[1], ends):
        unused[start:end] = False
    k[unused] = v[unused] = q[sum(lens_q):] = math.nan
    got = call(q, k, v, cu, (None, used), (max(lens_q), max(lens_k)), **options)
    rows = slice(0, sum(lens_q))
    assert bool((got[0][rows.stop:] == 0).all())
    def oracle(dtype):
        return varlen_attention(q[rows], k, v, *cu, seqused_k=used, dtype=dtype, **options)[:2]
    judge((got[0][rows], got[1][:, rows]), oracle)

"""
CASES = {
    **FORWARD_CASES,
    "window_left": "dense({d}, 300, 700, window=(64, -1))",
    "window_of_many_rows": "dense({d}, 2048, 2048, hq=1, hk=1, window=(100, 0))",
    "overflowing_scores": "dense({d}, 200, 900, rise=600.0)",
    "overflowing_scores_full": "dense({d}, 400, 900, rise=600.0)",
    "jumping_scores": "dense({d}, 200, 900, jump=200.0)",
    "jumping_scores_causal": "dense({d}, 400, 900, jump=200.0, causal=True)",
}


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, launched = answers(machine, log, PROGRAM, CASES)
    forward = {f"flash_fwd_sm90_d{d}_bf16" for d in HEAD_DIMS}
    forward |= {f"flash_fwd_sm90_scored_d{d}_bf16" for d in HEAD_DIMS}
    assert launched == forward | {"flash_fwd_sm90_wide_d64_bf16", "flash_fill_bf16"}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_hoppers_kernels_compute_attention(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""
