"""Attention over a latent on a CPU: shim, host library and device code, all but the GPU.

As in test_emulated.py: copies and products happen late and in random order, a CTA gets several
tiles, and what no sequence uses holds NaN.
"""

from __future__ import annotations

import pytest
from emulated import LATENT_VALUE_DIMS, answers
from native_tools import Stub

PROGRAM = """
from oracle import kvcache_attention, varlen_attention

def call(q, k, v, qv, cu=(None, None), used=(None, None), max_seqlens=(None, None), leftpad=None,
         table=None, rows=None, scale=None, causal=False, window=(-1, -1), attention_chunk=0,
         softcap=0.0, slopes=None, splits=1):
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=DTYPE)
    right = 0 if causal else window[1]
    return torch.ops.flash_attn_cuda.forward.default.redispatch(
        CUDA, q, k, v, qv, out, *[None] * 6, True, *cu, *used, leftpad, table, rows, *max_seqlens,
        scale, window[0], right, attention_chunk, softcap, slopes, 0.0, None, False, splits)[:2]

def scale_of(q, v, scale):
    return (q.shape[-1] + v.shape[-1]) ** -0.5 if scale is None else scale

def dense(dv, sq, sk, hq=4, hk=1, b=2, d=64, rise=0.0, has_qv=True, splits=1, scale=None,
          **options):
    q, k, v = make(b, sq, hq, d), make(b, sk, hk, d), make(b, sk, hk, dv)
    qv = make(b, sq, hq, dv) if has_qv else None
    if rise:  # scores that grow from block to block
        q[..., 0] = 8.0
        k[..., 0] = torch.linspace(rise, 0, sk).to(DTYPE)[:, None]
    scale = scale_of(q, v, scale)
    kept = dict(options, softmax_scale=scale)
    kept["alibi_slopes"] = kept.pop("slopes", None)
    got = call(q, k, v, qv, scale=scale, splits=splits, **options)
    judge(got, lambda dtype: attention(q, k, v, qv=qv, dtype=dtype, **kept)[:2])

def packed(dv, lens_q, lens_k, hq=4, hk=1, used_k=None, splits=1, **options):
    cu = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
          for x in (lens_q, lens_k)]
    rows = sum(lens_k) + 5
    q, qv, k, v = (make(n, h, d) for n, h, d in (
        (sum(lens_q) + 3, hq, 64), (sum(lens_q) + 3, hq, dv), (rows, hk, 64), (rows, hk, dv)))
    used = None if used_k is None else torch.tensor(used_k, dtype=torch.int32)
    ends = cu[1][:-1] + used if used_k else cu[1][1:]
    unused = torch.ones(len(k), dtype=torch.bool)
    for start, end in zip(cu[1], ends):
        unused[start:end] = False
    k[unused] = v[unused] = q[sum(lens_q):] = math.nan
    scale = scale_of(q, v, None)
    got = call(q, k, v, qv, cu, (None, used), (max(lens_q), max(lens_k)), splits=splits,
               scale=scale, **options)
    rows = slice(0, sum(lens_q))
    assert bool((got[0][rows.stop:] == 0).all())
    def oracle(dtype):
        return varlen_attention(q[rows], k, v, *cu, qv=qv[rows], seqused_k=used, dtype=dtype,
                                softmax_scale=scale, **options)[:2]
    judge((got[0][rows], got[1][:, rows]), oracle)

def paged(dv, page, sq, used_k, hq=4, hk=1, lens_q=None, leftpad=None, splits=1, **options):
    b, num_pages = len(used_k), max(used_k) // page + 2
    table = torch.randperm(b * num_pages).view(b, num_pages).int()
    # One buffer, as servers have it.
    both = make(b * num_pages, page, hk, 64 + dv)
    k, v = both[..., :64], both[..., 64:]
    unused = torch.ones(b * num_pages, page, dtype=torch.bool)
    for i, used in enumerate(used_k):
        slots, pages = torch.arange(leftpad[i] if leftpad else 0, used), table[i]
        unused[pages[slots // page].long(), slots % page] = False
        pages[-(-used // page) :] = -5
        pages[-(-used // page)] = 10**6
    both[unused] = math.nan
    cu_q = None if lens_q is None else torch.tensor([0, *torch.tensor(lens_q).cumsum(0)]).int()
    shape = (b, sq) if lens_q is None else (sum(lens_q),)
    q, qv = make(*shape, hq, 64), make(*shape, hq, dv)
    used = torch.tensor(used_k, dtype=torch.int32)
    pad = None if leftpad is None else torch.tensor(leftpad, dtype=torch.int32)
    longest = (None if lens_q is None else max(lens_q), max(used_k))
    scale = scale_of(q, v, None)
    got = call(q, k, v, qv, (cu_q, None), (None, used), longest, pad, table, splits=splits,
               scale=scale, **options)
    cache = dict(cache_seqlens=used, block_table=table, cu_seqlens_q=cu_q, cache_leftpad=pad,
                 softmax_scale=scale)
    judge(got, lambda dtype: kvcache_attention(q, k, v, qv=qv, dtype=dtype, **cache, **options)[:2])

"""
CASES = {
    "one_row": "dense({d}, 1, 1)",
    "one_block": "dense({d}, 3, 64)",
    "ragged": "dense({d}, 70, 333)",
    "even_blocks": "dense({d}, 64, 256, hq=8, hk=2)",
    "causal": "dense({d}, 150, 150, causal=True)",
    "causal_more_keys": "dense({d}, 33, 200, causal=True)",
    "rows_without_keys": "dense({d}, 100, 30, causal=True)",
    "window": "dense({d}, 100, 300, window=(70, 30))",
    "chunk": "dense({d}, 64, 192, attention_chunk=50)",
    "softcap": "dense({d}, 20, 150, softcap=10.0, causal=True)",
    "alibi": "dense({d}, 70, 130, slopes=torch.tensor([0.1, 0.4, 0.2, 0.3]))",
    "negative_scale": "dense({d}, 20, 100, scale=-0.05)",
    "rising_scores": "dense({d}, 20, 500, rise=60.0)",
    "narrow_v": "dense({d} - 24, 40, 130)",
    "narrow_head_dim": "dense({d}, 40, 130, d=40)",
    "heads_share_tiles": "dense({d}, 2, 300, hq=16, causal=True)",
    "odd_heads_share_tiles": "dense({d}, 5, 200, hq=20, causal=True)",
    "more_heads_than_rows": "dense({d}, 2, 130, hq=128, b=1, causal=True)",
    "parts": "dense({d}, 2, 700, hq=16, splits=3)",
    "more_parts_than_blocks": "dense({d}, 2, 150, hq=16, splits=3, causal=True)",
    "packed": "packed({d}, (10, 0, 70, 1), (100, 50, 133, 257))",
    "packed_causal": "packed({d}, (30, 5, 65), (30, 300, 66), causal=True)",
    "packed_used": "packed({d}, (30, 5, 65), (30, 300, 66), used_k=(1, 290, 0))",
    "packed_in_parts": "packed({d}, (3, 5), (30, 300), splits=2, hq=16)",
    "pages": "paged({d}, 16, 3, (133, 0, 300), hq=16)",
    "large_pages": "paged({d}, 64, 40, (200, 64), causal=True)",
    "pages_of_one_row": "paged({d}, 1, 2, (133, 1, 90), hq=16, causal=True)",
    "pages_of_odd_size": "paged({d}, 12, 70, (133, 90))",
    "pages_behind_padding": "paged({d}, 16, 3, (133, 90), leftpad=(5, 40))",
    "pages_and_packed_queries": "paged({d}, 16, 0, (133, 7, 64), lens_q=(10, 0, 40), causal=True)",
    "pages_in_parts": "paged({d}, 1, 2, (133, 0, 300), hq=16, splits=2)",
}
# Of V wider than other kernels take: without a second query.
WIDE = {
    "one_query": "dense({d}, 1, 200, has_qv=False)",
    "causal": "dense({d}, 150, 150, causal=True, has_qv=False)",
    "narrower": "dense({d} - 200, 70, 333, d=32, has_qv=False)",
}


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, launched = answers(machine, log, PROGRAM, CASES, LATENT_VALUE_DIMS)
    kernels = {f"flash_fwd_sm90_latent_d{d}_bf16" for d in LATENT_VALUE_DIMS}
    assert launched == kernels | {"flash_fill_bf16", "flash_combine_bf16"}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", LATENT_VALUE_DIMS)
def test_a_second_query_is_multiplied_by_values(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""


@pytest.fixture(scope="module")
def told_of_wide(
    machine: Stub, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """What each case of wide V came to."""
    log = tmp_path_factory.mktemp("wide") / "log"
    results, launched = answers(machine, log, PROGRAM, WIDE, (512,))
    assert launched == {"flash_fwd_sm90_latent_d512_bf16"}
    return results


@pytest.mark.parametrize("name", WIDE)
def test_v_may_be_wide(told_of_wide: dict[tuple[int, str], str], name: str) -> None:
    assert told_of_wide[512, name] == ""
