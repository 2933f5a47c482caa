"""Hopper's FP8 kernels on a CPU, as test_emulated.py runs those for 16 bits."""

from __future__ import annotations

import pytest
from emulated import HEAD_DIMS, answers
from native_tools import Stub

PROGRAM = """
from oracle import visible_keys
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
        CUDA, q, k, v, out, *[None] * 6, True, *cu, *used, None, None, None, *max_seqlens,
        scale, window[0], right, attention_chunk, softcap, slopes, 0.0, None, False, 1, *descale)
    return result[:2]

def rounded_probabilities(q, k, v, visible, scale):
    # The formula with probabilities of e4m3, by which the error may be judged.
    s = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * scale
    s = s.masked_fill(~visible, -math.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=-1e30))
    total = p.sum(-1).clamp(min=1e-30)
    rounded = (256 * p).to(E4M3).float() / 256
    return (torch.einsum("bhij,bjhd->bihd", rounded, v.float())
            / total.transpose(1, 2)[..., None]).to(BF16)

def dense(d, sq, sk, hq=2, hk=1, b=2, rise=0.0, dv=None, descaled=True, **options):
    q, k, v = fp8(b, sq, hq, d), fp8(b, sk, hk, d), fp8(b, sk, hk, dv or d)
    if rise:  # scores that grow from block to block
        q[..., 0] = torch.tensor(8.0).to(E4M3)
        k[..., 0] = torch.linspace(rise, 0, sk).to(E4M3)[:, None]
    descale = [torch.rand(b, hk) + 0.5 for _ in range(3)] if descaled else [None] * 3
    got = call(q, k, v, descale, **options)
    judge(got, q, k, v, descale, **options)

def judge(got, q, k, v, descale, scale=None, slopes=None, window=(-1, -1), causal=False,
          attention_chunk=0, softcap=0.0):
    values = []
    for x, factor in zip((q, k, v), descale):
        x = x.double()
        if factor is not None:
            x = x * factor.double().repeat_interleave(x.shape[2] // factor.shape[1], 1)[:, None, :, None]
        values.append(x.repeat_interleave(q.shape[2] // x.shape[2], 2))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    exact, lse = attention(*values, softmax_scale=scale, causal=causal, window=window, softcap=softcap,
                           attention_chunk=attention_chunk, alibi_slopes=slopes, dtype=torch.float64)
    print(float((got[0].double()-exact).norm()/exact.norm()), end=" ", file=open("/tmp/fp8err","a"))
    visible = visible_keys(q.shape[1], k.shape[1], causal=causal, window=window,
                           attention_chunk=attention_chunk)
    if softcap == 0 and slopes is None:
        rough = rounded_probabilities(*values, visible, scale)
        print(float((rough.double()-exact).norm()/exact.norm()), file=open("/tmp/fp8err","a"))
        check("out", got[0], exact, rough, atol=2e-3)
    else:
        assert float((got[0].double()-exact).norm()/exact.norm()) < 0.03
    check("lse", got[1], lse, lse.float(), atol=1e-4)
"""
CASES = {
    "one_row": "dense({d}, 1, 1)",
    "ragged": "dense({d}, 200, 333)",
    "whole_blocks": "dense({d}, 256, 256, hq=4, hk=2)",
    "full": "dense({d}, 700, 600, hq=4, hk=2)",
    "no_descale": "dense({d}, 100, 200, descaled=False)",
    "causal": "dense({d}, 300, 300, causal=True)",
    "causal_many_heads": "dense({d}, 300, 300, hq=6, hk=3, b=3, causal=True)",
    "causal_more_keys": "dense({d}, 257, 640, causal=True)",
    "rows_without_keys": "dense({d}, 300, 100, causal=True)",
    "window": "dense({d}, 500, 500, window=(100, 30))",
    "softcap": "dense({d}, 200, 300, softcap=10.0, causal=True)",
    "alibi": "dense({d}, 200, 290, slopes=torch.tensor([0.1, 0.4]))",
    "negative_scale": "dense({d}, 200, 300, scale=-0.1)",
    "narrow_v": "dense({d}, 150, 270, dv={d} - 24)",
    "odd_head_dim": "dense({d} - 8, 150, 270)",
    "rising_scores": "dense({d}, 200, 900, rise=60.0)",
    "overflowing_scores": "dense({d}, 200, 900, rise=440.0)",
}


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, launched = answers(machine, log, PROGRAM, CASES)
    print(launched)
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_hoppers_kernels_compute_attention(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""
