"""Hopper's forward kernels on a CPU: shim, host library and device code, all but the GPU.

The emulator of `emulator/` runs the device code with copies and products that happen late and in
random order, so what is tested is masks, layouts, and which buffer may be touched when. A CTA gets
several tiles, because the device has only two multiprocessors, and heads come in sections of few,
because its L2 cache is small.
"""

from __future__ import annotations

import pytest
from emulated import FORWARD_CASES, HEAD_DIMS, answers
from native_tools import Stub, lines_of

PROGRAM = """
from oracle import kvcache_attention, varlen_attention

def call(q, k, v, cu=(None, None), used=(None, None), max_seqlens=(None, None), leftpad=None,
         table=None, rows=None, scale=None, causal=False, window=(-1, -1), attention_chunk=0,
         softcap=0.0, slopes=None, splits=1):
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=DTYPE)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    right = 0 if causal else window[1]
    result = torch.ops.flash_attn_cuda.forward.default.redispatch(
        CUDA, q, k, v, None, out, *[None] * 6, True, *cu, *used, leftpad, table, rows, *max_seqlens,
        scale, window[0], right, attention_chunk, softcap, slopes, 0.0, None, False, splits)
    return result[:2]

def rising(rise, low, at, num_keys):
    # Scores that grow from block to block: the last one comes first.
    return (low + rise * (1 - at / num_keys)).to(DTYPE)[:, None]

def dense(d, sq, sk, hq=2, hk=1, b=2, rise=0.0, low=0.0, jump=0.0, dv=None, splits=1, **options):
    q, k, v = make(b, sq, hq, d), make(b, sk, hk, d), make(b, sk, hk, dv or d)
    if rise or jump:
        q[..., 0] = 8.0
    if rise:
        k[..., 0] = rising(rise, low, torch.arange(sk), sk)
    if jump:  # scores of which the first block tells nothing
        k[..., 0] = (jump * (torch.arange(sk) < sk - 150)).to(DTYPE)[:, None]
    kept = dict(options)
    kept["alibi_slopes"] = kept.pop("slopes", None)
    kept["softmax_scale"] = kept.pop("scale", None)
    got = call(q, k, v, splits=splits, **options)
    judge(got, lambda dtype: attention(q, k, v, dtype=dtype, **kept)[:2])

def packed(d, lens_q, lens_k, hq=2, hk=1, dv=None, used_k=None, splits=1, longest=None,
           **options):
    cu = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
          for x in (lens_q, lens_k)]
    # Rows behind the last sequence, and behind those in use, hold anything.
    rows = sum(lens_k) + 5
    q, k, v = make(sum(lens_q) + 3, hq, d), make(rows, hk, d), make(rows, hk, dv or d)
    used = None if used_k is None else torch.tensor(used_k, dtype=torch.int32)
    ends = cu[1][:-1] + used if used_k else cu[1][1:]
    unused = torch.ones(len(k), dtype=torch.bool)
    for start, end in zip(cu[1], ends):
        unused[start:end] = False
    k[unused] = v[unused] = q[sum(lens_q):] = math.nan
    longest = (longest or max(lens_q), longest or max(lens_k))
    got = call(q, k, v, cu, (None, used), longest, splits=splits, **options)
    rows = slice(0, sum(lens_q))
    assert bool((got[0][rows.stop:] == 0).all())
    def oracle(dtype):
        return varlen_attention(q[rows], k, v, *cu, seqused_k=used, dtype=dtype, **options)[:2]
    judge((got[0][rows], got[1][:, rows]), oracle)

def in_use(d, sq, sk, used_q, used_k, hq=2, hk=1, splits=1, **options):
    # A batch of which rows behind those in use hold anything, and have out 0.
    used = [torch.tensor(x, dtype=torch.int32) for x in (used_q, used_k)]
    b = len(used_q)
    q, k, v = make(b, sq, hq, d), make(b, sk, hk, d), make(b, sk, hk, d)
    for i, (rows, keys) in enumerate(zip(used_q, used_k)):
        q[i, rows:] = k[i, keys:] = v[i, keys:] = math.nan
    out, lse = call(q, k, v, used=used, splits=splits, **options)
    for i, (rows, keys) in enumerate(zip(used_q, used_k)):
        assert bool((out[i, rows:] == 0).all() and (lse[i, :, rows:] == math.inf).all())
        own = [x[i : i + 1, :n] for x, n in ((q, rows), (k, keys), (v, keys))]
        got = out[i : i + 1, :rows], lse[i : i + 1, :, :rows]
        if rows:
            judge(got, lambda dtype: attention(*own, dtype=dtype, **options)[:2])

def paged(d, page, sq, used_k, hq=2, hk=1, lens_q=None, rows=None, rise=0.0, low=0.0, jump=0.0,
          splits=1, longest=None, **options):
    b, num_pages = len(used_k), max(used_k) // page + 2
    table = torch.randperm(b * num_pages).view(b, num_pages).int()
    k, v = make(b * num_pages, page, hk, d), make(b * num_pages, page, hk, d)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    # Slots that no sequence uses, and entries of the table for them, hold anything.
    unused = torch.ones(b * num_pages, page, dtype=torch.bool)
    for i, used in enumerate(used_k):
        slots, pages = torch.arange(used), table[i if rows is None else rows[i]]
        at = pages[slots // page].long(), slots % page
        unused[at] = False
        if rise:
            k[(*at, slice(None), 0)] = rising(rise, low, slots, used)
        if jump:
            k[(*at, slice(None), 0)] = (jump * (slots < used - 150)).to(DTYPE)[:, None]
        pages[-(-used // page) :] = -5
        pages[-(-used // page)] = 10**6
    k[unused] = v[unused] = math.nan
    cu_q = None if lens_q is None else torch.tensor([0, *torch.tensor(lens_q).cumsum(0)]).int()
    q = make(b, sq, hq, d) if lens_q is None else make(sum(lens_q), hq, d)
    if rise or jump:
        q[..., 0] = 8.0
    used = torch.tensor(used_k, dtype=torch.int32)
    if longest:
        table = torch.nn.functional.pad(table, (0, -(-longest // page) - num_pages), value=-5)
    longest = (None if lens_q is None else longest or max(lens_q), longest or max(used_k))
    where = dict(table=table, rows=rows, splits=splits)
    got = call(q, k, v, (cu_q, None), (None, used), longest, **where, **options)
    cache = dict(cache_seqlens=used, block_table=table, cache_batch_idx=rows, cu_seqlens_q=cu_q)
    judge(got, lambda dtype: kvcache_attention(q, k, v, dtype=dtype, **cache, **options)[:2])

"""
CASES = {
    **FORWARD_CASES,
    "window_left": "dense({d}, 300, 700, window=(64, -1))",
    "window_of_many_rows": "dense({d}, 2048, 2048, hq=1, hk=1, window=(100, 0))",
    "causal_of_many_rows": "dense({d}, 2100, 1300, hq=1, hk=1, causal=True)",
    "rising_negative_scores": "dense({d}, 400, 900, rise=60.0, low=-120.0)",
    "overflowing_scores": "dense({d}, 200, 900, rise=600.0)",
    "overflowing_negative_scores": "dense({d}, 200, 900, rise=900.0, low=-1000.0)",
    "overflowing_scores_full": "dense({d}, 400, 900, rise=600.0)",
    "jumping_scores": "dense({d}, 200, 900, jump=200.0)",
    "jumping_scores_causal": "dense({d}, 400, 900, jump=200.0, causal=True)",
    "rows_in_use": "in_use({d}, 200, 300, (200, 130, 0), (300, 200, 30))",
    "few_rows_in_use": "in_use({d}, 20, 400, (20, 7), (400, 200), hq=8, hk=2, causal=True)",
    "rows_in_use_in_parts": "in_use({d}, 200, 700, (200, 30), (700, 500), splits=3)",
    "pages": "paged({d}, 16, 300, (333, 0, 700))",
    "pages_causal": "paged({d}, 64, 200, (333, 150, 700), causal=True, rows=(1, 2, 0))",
    "small_pages": "paged({d}, 8, 120, (5, 300), hq=4, hk=2, softcap=10.0)",
    "pages_of_24": "paged({d}, 24, 150, (299, 500), window=(100, 0))",
    "large_pages": "paged({d}, 256, 130, (500, 256))",
    "pages_of_jumping_scores": "paged({d}, 24, 200, (900, 600), jump=200.0)",
    "split": "dense({d}, 200, 900, splits=3)",
    "split_causal": "dense({d}, 300, 300, hq=4, hk=2, causal=True, splits=3)",
    "split_window": "dense({d}, 140, 700, window=(200, 0), splits=2)",
    "split_softcap": "dense({d}, 130, 600, softcap=10.0, splits=2)",
    "split_alibi": "dense({d}, 100, 500, slopes=torch.tensor([0.1, 0.4]), splits=2)",
    "split_narrow_v": "dense({d}, 150, 570, dv={d} - 24, splits=4)",
    "split_jumping_scores": "dense({d}, 200, 900, jump=200.0, splits=2)",
    "few_rows_in_many_parts": "dense({d}, 3, 900, hq=4, hk=2, b=1, causal=True, splits=6)",
    "split_packed": "packed({d}, (100, 0, 200, 1), (100, 50, 633, 257), splits=3)",
    "split_pages": "paged({d}, 16, 150, (333, 0, 700), splits=3)",
    "heads_share_tiles": "dense({d}, 9, 400, hq=16, hk=2, causal=True)",
    "odd_heads_share_tiles": "dense({d}, 30, 400, hq=14, hk=2, causal=True, splits=2)",
    "packed_of_one_tile_and_of_more": "packed({d}, (1, 300, 1, 0, 7, 520, 1),"
    " (90, 300, 257, 5, 64, 520, 0), causal=True)",
    "packed_of_one_tile_and_more_in_parts": "packed({d}, (1, 300, 2), (500, 300, 257), splits=2)",
    "heads_share_packed_tiles_of_one_and_of_more": "packed({d}, (1, 90, 1, 2), (300, 200, 90, 7),"
    " hq=8, hk=2, causal=True)",
    "odd_heads_share_packed_tiles": "packed({d}, (20, 0, 33), (100, 50, 333), hq=5, hk=1)",
    "heads_share_tiles_in_parts": "dense({d}, 20, 700, hq=8, hk=2, causal=True, splits=3)",
    "heads_share_tiles_in_a_window": "dense({d}, 35, 400, hq=8, hk=2, window=(100, 5))",
    "heads_share_tiles_with_softcap": "dense({d}, 3, 300, hq=64, hk=1, softcap=10.0, causal=True)",
    "more_heads_than_rows_share_tiles": "dense({d}, 3, 300, hq=128, hk=1, b=1, causal=True)",
    "heads_share_tiles_of_jumping_scores": "dense({d}, 20, 900, hq=8, hk=1, jump=200.0)",
    "heads_share_packed_tiles": "packed({d}, (20, 0, 33), (100, 50, 333), hq=8, hk=2, causal=True)",
    "heads_share_packed_tiles_in_parts": "packed({d}, (20, 33), (100, 333), hq=8, hk=2, splits=2)",
    "heads_share_tiles_over_pages": "paged({d}, 16, 0, (300, 7), hq=8, lens_q=(9, 5), causal=True)",
    "pages_and_packed_queries": "paged({d}, 32, 0, (300, 7, 64), lens_q=(100, 0, 40), causal=True)",
}
# Of wide tiles, which are for long calls: packed sequences may be shorter than the longest is said
# to be.
LONG_HEAD_DIMS = (64, 96, 128)
LONG = {
    "whole_tiles": "packed({d}, (384, 192), (600, 256), longest=8192)",
    "ragged": "packed({d}, (300, 7, 0, 200), (333, 50, 100, 700), longest=8192)",
    "causal": "packed({d}, (400, 5, 256), (400, 300, 256), longest=8192, causal=True)",
    "rows_without_keys": "packed({d}, (300, 130), (100, 129), longest=8192, causal=True)",
    "used": "packed({d}, (130, 5, 256), (130, 300, 256), used_k=(1, 290, 0), longest=8192)",
    "pages": "paged({d}, 16, 0, (333, 700), lens_q=(200, 140), longest=8192)",
    "pages_causal": "paged({d}, 24, 0, (300, 100), hk=2, lens_q=(200, 90), longest=8192,"
    " causal=True)",
    "jumping_scores": "paged({d}, 64, 0, (900, 600), hk=2, lens_q=(200, 90), longest=8192,"
    " jump=200.0)",
    "rising_scores": "paged({d}, 64, 0, (900, 600), hk=2, lens_q=(200, 90), longest=8192,"
    " rise=60.0)",
    "rising_negative_scores": "paged({d}, 64, 0, (900, 600), hk=2, lens_q=(200, 90), longest=8192,"
    " rise=60.0, low=-120.0, causal=True)",
    "overflowing_negative_scores": "paged({d}, 64, 0, (900, 600), hk=2, lens_q=(200, 90),"
    " longest=8192, rise=900.0, low=-1000.0)",
    "dense": "dense({d}, 4096, 4099, hq=1, hk=1, b=1)",
}
# Of V with at most 128 columns beside wider Q and K.
NARROW = {
    "full": "dense(192, 256, 640, dv=128)",
    "ragged": "dense(192, 200, 333, b=2, hk=2, dv=128)",
    "narrower": "dense(160, 150, 290, hk=2, dv=72, causal=True)",
    "causal": "dense(192, 300, 700, hk=2, dv=128, causal=True)",
    "rows_without_keys": "dense(192, 400, 150, hk=2, dv=128, causal=True)",
    "window": "dense(192, 300, 500, hk=2, dv=128, window=(64, 30))",
    "rising_scores": "dense(192, 400, 900, hk=2, dv=128, rise=60.0)",
    "overflowing_scores": "dense(192, 400, 900, hk=2, dv=128, rise=600.0)",
    "jumping_scores": "dense(192, 400, 900, hk=2, dv=128, jump=200.0, causal=True)",
    "packed": "packed(192, (130, 0, 200, 1), (100, 50, 333, 257), hk=2, dv=128, causal=True)",
    "packed_used": "packed(192, (130, 5, 256), (130, 300, 256), hk=2, dv=128, used_k=(1, 290, 0))",
}
# Of head dim 256, where CTAs run in pairs. One of a pair has fewer blocks of keys, or rows without
# any.
PAIRS = {
    "equal": "dense({d}, 500, 500, hq=4, hk=2, b=3, causal=True)",
    "more_keys": "dense({d}, 256, 700, causal=True)",
    "rows_without_keys": "dense({d}, 400, 150, causal=True)",
    "later_keys": "dense({d}, 512, 600, window=(-1, 70))",
    "softcap": "dense({d}, 450, 400, softcap=10.0, causal=True)",
    "jumping_scores": "dense({d}, 450, 900, jump=200.0, causal=True)",
    "narrow_v": "dense({d}, 256, 270, dv={d} - 104, causal=True)",
}


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, launched = answers(machine, log, PROGRAM, CASES)
    forward = {f"flash_fwd_sm90_d{d}_bf16" for d in HEAD_DIMS}
    forward |= {f"flash_fwd_sm90_scored_d{d}_bf16" for d in HEAD_DIMS}
    assert launched == forward | {"flash_fill_bf16", "flash_combine_bf16"}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_hoppers_kernels_compute_attention(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""


@pytest.fixture(scope="module")
def told_of_long(
    machine: Stub, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """What each case of long calls came to."""
    log = tmp_path_factory.mktemp("long") / "log"
    results, launched = answers(machine, log, PROGRAM, LONG, LONG_HEAD_DIMS)
    wide = {f"flash_fwd_sm90_wide_d{d}_bf16" for d in LONG_HEAD_DIMS}
    assert launched == wide | {"flash_fill_bf16"}
    return results


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("d", LONG_HEAD_DIMS)
def test_wide_tiles_compute_attention(
    told_of_long: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told_of_long[d, name] == ""


@pytest.fixture(scope="module")
def told_of_narrow(
    machine: Stub, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """What each case of a narrow V came to."""
    log = tmp_path_factory.mktemp("narrow") / "log"
    results, launched = answers(machine, log, PROGRAM, NARROW, (192,))
    assert launched == {"flash_fwd_sm90_narrow_d192_bf16", "flash_fill_bf16"}
    return results


@pytest.mark.parametrize("name", NARROW)
def test_narrow_values_take_no_columns_that_are_none(
    told_of_narrow: dict[tuple[int, str], str], name: str
) -> None:
    assert told_of_narrow[192, name] == ""


@pytest.fixture(scope="module")
def told_of_pairs(
    machine: Stub, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """What each case of pairs came to, with one multiprocessor too many."""
    log = tmp_path_factory.mktemp("pairs") / "log"
    results, _ = answers(machine, log, PROGRAM, PAIRS, (256,), num_sms=5)
    pairs = [f"flash_fwd_sm90{kernel}_d256_bf16 2" for kernel in ("", "_scored")]
    found = [line.removeprefix("cluster ") for line in lines_of(log, "cluster")]
    assert len(found) == len(PAIRS)
    assert set(found) == set(pairs)
    return results


@pytest.mark.parametrize("name", PAIRS)
def test_two_ctas_load_keys_together(told_of_pairs: dict[tuple[int, str], str], name: str) -> None:
    assert told_of_pairs[256, name] == ""
