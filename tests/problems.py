"""The cases, as rows that every backend runs. Corners are listed, not crossed.

SMOKE is a first look at a new backend (seconds), CORE is dense attention forward and backward,
DROPOUT, VARLEN and KVCACHE what their names say, FA3 and FA3_KVCACHE the arguments that only the
FlashAttention-3 names have, LATENT and LATENT_KVCACHE among them `qv` and a wide V.
"""

from __future__ import annotations

from dataclasses import replace

from cache_problem import CacheProblem
from problem_types import (
    BF16,
    DTYPES,
    FP8,
    FP16,
    FP32,
    FP64,
    Problem,
    varlen,
)

SMOKE = [
    Problem(dtype=BF16),
    Problem(sq=113, sk=203, hq=6, hk=2, d=128, dtype=BF16, causal=True),
    Problem(sq=203, sk=113, d=64, dtype=FP16, causal=True),
    Problem(sq=128, sk=128, d=64, dtype=FP32, packing="qkv", causal=True),
    Problem(sq=65, sk=127, d=40, dtype=BF16, window=(16, 8)),
    Problem(sq=64, sk=64, d=64, dtype=FP16, softcap=15.0),
    Problem(sq=63, sk=129, hq=4, hk=1, d=96, dtype=BF16, alibi="bh", causal=True),
    Problem(b=1, sq=1, sk=257, hq=8, hk=2, d=128, dtype=BF16),
]

# Each feature in each precision; sizes are ragged so that no tile is full.
_FEATURES = [
    {},
    {"causal": True},
    {"window": (11, 5)},
    {"hq": 6, "hk": 2},
    {"hq": 4, "hk": 1, "causal": True},
    {"softcap": 20.0},
    {"alibi": "h"},
    {"alibi": "bh", "causal": True},
    {"softmax_scale": 0.31},
    {"softcap": 8.0, "alibi": "bh", "window": (40, 0), "hq": 4, "hk": 2},
]
_BY_DTYPE = [
    Problem(sq=67, sk=91, d=48, dtype=dtype, **feature) for feature in _FEATURES for dtype in DTYPES
]

# (sq, sk, causal): tiles one short, full and one over; rows without keys when causal and sq > sk.
_SIZES = [
    Problem(sq=sq, sk=sk, d=32, causal=causal, dtype=dtype)
    for sq, sk, causal, dtype in [
        (1, 1, False, FP32),
        (1, 1, True, BF16),
        (1, 63, True, FP32),
        (63, 1, False, BF16),
        (63, 1, True, FP32),
        (2, 3, True, FP64),
        (63, 63, True, BF16),
        (65, 65, True, FP16),
        (64, 128, True, BF16),
        (128, 64, True, BF16),
        (127, 129, False, BF16),
        (129, 127, True, FP32),
        (113, 203, False, BF16),
        (108, 256, True, FP16),
        (256, 256, True, BF16),
        (255, 257, False, FP32),
        (3, 300, True, BF16),
        (300, 3, True, FP32),
        (17, 0, False, FP32),
        (17, 0, True, BF16),
        (0, 17, False, FP32),
        (0, 17, True, BF16),
        (0, 0, False, FP32),
    ]
]

_HEAD_DIMS = [
    Problem(sq=70, sk=75, hq=2, hk=1, d=d, causal=causal, dtype=dtype)
    for d, causal, dtype in [
        (1, True, FP32),
        (1, False, BF16),
        (2, False, BF16),
        (7, True, FP16),
        (8, False, BF16),
        (16, True, FP32),
        (40, False, FP16),
        (59, True, BF16),
        (59, False, FP32),
        (64, True, BF16),
        (80, True, FP16),
        (96, False, BF16),
        (111, True, BF16),
        (128, False, BF16),
        (128, True, FP64),
        (160, True, BF16),
        (192, False, FP16),
        (224, True, BF16),
        (255, False, BF16),
        (256, True, BF16),
        (256, False, FP32),
    ]
]

_WINDOWS = [
    Problem(sq=sq, sk=sk, window=window, causal=causal, dtype=dtype)
    for sq, sk, window, causal, dtype in [
        (70, 70, (0, 0), False, FP32),
        (70, 90, (0, 0), False, BF16),
        (90, 70, (0, 0), False, FP32),
        (70, 90, (13, -1), False, BF16),
        (70, 90, (-1, 13), False, FP32),
        (70, 90, (-1, 0), False, BF16),
        (90, 70, (0, -1), False, FP32),
        (70, 90, (64, 64), False, BF16),
        (70, 90, (300, 300), False, FP32),
        (70, 90, (89, 69), False, FP32),
        (70, 90, (9, 30), True, BF16),
        (200, 100, (10, 20), False, BF16),
        (200, 100, (10, -1), True, FP32),
        (100, 250, (20, 10), False, FP16),
        (1, 100, (10, 0), True, BF16),
    ]
]

_PACKINGS = [
    Problem(sq=69, sk=69, d=32, packing="qkv", dtype=FP64, causal=True),
    Problem(sq=69, sk=69, d=40, packing="qkv", dtype=BF16),
    Problem(sq=69, sk=69, d=59, packing="qkv", dtype=FP16, causal=True, alibi="h"),
    Problem(sq=69, sk=69, d=32, packing="qkv", dtype=FP32, window=(7, 7), softcap=5.0),
    Problem(sq=69, sk=90, d=32, packing="kv", dtype=FP64, hq=4, hk=2),
    Problem(sq=69, sk=90, d=64, packing="kv", dtype=BF16, hq=4, hk=1, causal=True),
    Problem(sq=69, sk=90, d=111, packing="kv", dtype=FP16, window=(20, -1)),
    Problem(sq=90, sk=69, d=32, packing="kv", dtype=FP32, alibi="bh", softcap=9.0),
    Problem(sq=9, sk=0, d=32, packing="kv", dtype=FP32),
]

_LAYOUTS = [
    Problem(sq=33, sk=70, d=40, layout="headsfirst", dtype=BF16, causal=True),
    Problem(sq=33, sk=70, d=40, layout="sliced", dtype=BF16),
    Problem(sq=33, sk=70, d=40, layout="lastdim", dtype=FP32, causal=True),
    Problem(sq=33, sk=70, d=40, layout="misaligned", dtype=FP16),
    Problem(sq=33, sk=70, d=40, layout="seqfirst", dtype=BF16),
    Problem(sq=70, sk=70, d=64, layout="headsfirst", packing="qkv", dtype=BF16),
    Problem(sq=33, sk=70, d=59, layout="sliced", packing="kv", dtype=FP32),
    Problem(sq=33, sk=70, d=64, layout="huge", packing="kv", dtype=BF16, causal=True),
]

_OTHER = [
    Problem(b=1, sq=80, sk=80, hq=1, hk=1, dtype=FP32),
    Problem(b=5, sq=20, sk=30, hq=3, hk=3, dtype=BF16),
    Problem(b=1, sq=40, sk=40, hq=16, hk=1, dtype=BF16, causal=True),
    Problem(sq=80, sk=90, hq=4, hk=2, dtype=BF16, deterministic=True, causal=True),
    Problem(sq=80, sk=90, softmax_scale=0.0, dtype=FP32),
    Problem(sq=80, sk=90, softmax_scale=-0.2, dtype=FP32),
    Problem(sq=80, sk=90, softmax_scale=6.0, dtype=FP32, causal=True),
    Problem(sq=80, sk=80, softmax_scale=0.0, dtype=FP32, causal=True),
    Problem(sq=80, sk=80, softmax_scale=-0.2, dtype=FP32, window=(-1, 0)),
    Problem(sq=1, sk=90, alibi="h", causal=True, dtype=BF16),
    Problem(sq=90, sk=40, alibi="h", causal=True, dtype=FP32),
    Problem(sq=90, sk=40, softcap=12.0, causal=True, hq=4, hk=2, dtype=BF16),
]

# Long enough for several blocks of keys, and of rows when heads are many.
_LONG = [
    Problem(sq=300, sk=700, hq=8, hk=4, d=16, dtype=FP32, causal=True),
    Problem(b=1, sq=700, sk=1100, hq=2, hk=1, d=16, dtype=BF16),
    Problem(b=1, sq=1500, sk=600, hq=1, hk=1, d=16, dtype=BF16, window=(100, 50)),
    Problem(b=1, sq=90, sk=2100, hq=1, hk=1, d=16, dtype=FP32, window=(700, -1), alibi="h"),
    Problem(b=1, sq=1100, sk=1100, hq=2, hk=2, d=16, dtype=FP32, softcap=5.0, packing="qkv"),
]

CORE = SMOKE + _BY_DTYPE + _SIZES + _HEAD_DIMS + _WINDOWS + _PACKINGS + _LAYOUTS + _OTHER + _LONG

DROPOUT = [
    Problem(sq=67, sk=91, dropout_p=0.17, dtype=FP64),
    Problem(sq=67, sk=91, dropout_p=0.17, dtype=FP32, causal=True, hq=4, hk=2),
    Problem(sq=128, sk=128, d=64, dropout_p=0.5, dtype=BF16, causal=True),
    Problem(sq=113, sk=203, d=59, dropout_p=0.17, dtype=FP16, window=(30, 30)),
    Problem(sq=203, sk=113, dropout_p=0.9, dtype=FP32, alibi="bh", causal=True),
    Problem(sq=65, sk=65, dropout_p=0.3, dtype=BF16, packing="qkv"),
    Problem(sq=1, sk=129, hq=4, hk=1, dropout_p=0.3, dtype=FP32, packing="kv"),
    varlen((30, 0, 77, 1), (45, 12, 77, 0), dropout_p=0.2, dtype=FP32, causal=True, hq=4, hk=2),
    varlen((130, 17), (40, 150), dropout_p=0.4, dtype=BF16, packing="kv"),
    varlen((33, 65), dropout_p=0.17, dtype=FP16, packing="qkv", alibi="h"),
]

VARLEN = [
    *(varlen((17, 64, 1, 90), (33, 64, 128, 5), d=48, dtype=dtype) for dtype in DTYPES),
    *(
        varlen((17, 64, 1, 90), (33, 64, 128, 5), d=64, hq=4, hk=2, causal=True, dtype=dtype)
        for dtype in DTYPES
    ),
    varlen((40,), dtype=FP32, causal=True),
    varlen((1, 1, 1), (50, 1, 7), dtype=BF16, hq=4, hk=1),
    varlen((1, 1, 1), (50, 1, 7), dtype=FP32, hq=4, hk=1, causal=True, alibi="bh"),
    varlen((0, 20, 0, 30, 0), (10, 20, 0, 0, 15), dtype=FP32),
    varlen((0, 20, 0, 30, 0), (10, 20, 0, 0, 15), dtype=BF16, causal=True, hq=4, hk=2),
    varlen((0, 0), (0, 0), dtype=FP32),
    varlen((5, 6), (0, 0), dtype=FP32, causal=True),
    varlen((128, 64, 256), (64, 128, 256), dtype=BF16, causal=True),
    varlen((17, 90), (33, 40), dtype=FP32, window=(9, 3)),
    varlen((17, 90), (33, 40), dtype=BF16, window=(-1, 3)),
    varlen((17, 90), (33, 40), dtype=FP16, window=(6, -1), causal=True),
    varlen((17, 90), (33, 40), dtype=FP32, softcap=10.0),
    varlen((17, 90), (33, 40), dtype=BF16, alibi="h"),
    varlen((17, 90), (33, 40), dtype=FP32, alibi="bh", causal=True, hq=4, hk=2),
    varlen((17, 90), (33, 40), dtype=FP32, softmax_scale=0.5, deterministic=True),
    varlen((17, 90), dtype=FP32, softmax_scale=-0.2, causal=True),
    varlen((17, 90), (33, 40), d=59, dtype=BF16, causal=True),
    varlen((17, 90), (33, 40), d=256, dtype=BF16, causal=True),
    varlen((33, 64, 1), d=32, dtype=FP64, packing="qkv", causal=True),
    varlen((33, 0, 64), d=59, dtype=BF16, packing="qkv", window=(5, 5)),
    varlen((33, 64), (70, 20), d=32, dtype=FP64, packing="kv", hq=4, hk=2),
    varlen((33, 64), (70, 20), d=40, dtype=BF16, packing="kv", hq=4, hk=1, causal=True),
    varlen((33, 64), (70, 20), d=40, dtype=BF16, layout="lastdim"),
    varlen((33, 64), (70, 20), d=40, dtype=FP32, layout="sliced", causal=True),
    varlen((33, 64), (70, 20), d=64, dtype=BF16, layout="headsfirst"),
    varlen((700, 3, 0, 500), (900, 1200, 5, 70), hq=2, hk=1, d=16, dtype=FP32, causal=True),
]

KVCACHE = [
    CacheProblem(seqlens=None),
    *(CacheProblem(dtype=dtype) for dtype in DTYPES),
    CacheProblem(dtype=BF16, seqlens=(0, 128), causal=True),
    CacheProblem(dtype=BF16, seqlens=(0, 0)),
    CacheProblem(seqlens=(50, 50), scalar_seqlen=True, s_new=1),
    CacheProblem(seqlens=(0, 127), s_new=1, causal=True),
    *(CacheProblem(dtype=dtype, sq=5, s_new=5, causal=True) for dtype in DTYPES),
    CacheProblem(dtype=BF16, sq=33, s_new=31),
    CacheProblem(sq=7, s_new=4, causal=True, hq=6, hk=1, d=59),
    CacheProblem(dtype=BF16, sq=3, s_new=3, causal=True, rotary_dim=32),
    CacheProblem(dtype=FP16, sq=3, s_new=3, causal=True, rotary_dim=32, interleaved=False),
    CacheProblem(sq=3, s_new=3, rotary_dim=64),
    CacheProblem(sq=3, s_new=5, rotary_dim=16, interleaved=False),
    CacheProblem(dtype=FP64, sq=3, s_new=3, rotary_dim=48, window=(20, 0)),
    CacheProblem(dtype=BF16, b=3, seqlens=(3, 40, 97), batch_idx=(4, 0, 2), causal=True, sq=2),
    CacheProblem(b=3, seqlens=(3, 40, 97), batch_idx=(1, 3, 0), s_new=2, sq=2, causal=True),
    CacheProblem(leftpad=(0, 33)),
    CacheProblem(dtype=BF16, leftpad=(17, 33), sq=4, causal=True, window=(25, -1)),
    CacheProblem(leftpad=(5, 0), sq=4, s_new=4, causal=True, rotary_dim=32),
    CacheProblem(leftpad=(40, 97)),
    *(
        CacheProblem(page=page, sq=sq, causal=True, dtype=dtype)
        for page, sq, dtype in [(256, 1, BF16), (16, 4, FP32), (1, 2, BF16), (7, 3, FP32)]
    ),
    CacheProblem(page=16, capacity=300, seqlens=(0, 299), sq=3, dtype=FP16),
    CacheProblem(page=16, sq=5, s_new=5, causal=True, rotary_dim=32, dtype=BF16),
    CacheProblem(page=5, sq=5, s_new=12, rotary_dim=16, interleaved=False),
    CacheProblem(page=64, alibi="bh", softcap=7.0, causal=True, sq=9, s_new=9),
    CacheProblem(alibi="h", dtype=BF16, sq=6, causal=True),
    CacheProblem(window=(30, 0), sq=4, dtype=BF16),
    CacheProblem(softcap=15.0, softmax_scale=0.2, sq=4),
    CacheProblem(num_splits=1, capacity=300, seqlens=(280, 3), dtype=BF16),
    CacheProblem(num_splits=5, capacity=300, seqlens=(280, 3), dtype=BF16, hq=8, hk=2, d=128),
    CacheProblem(num_splits=128, capacity=300, seqlens=(280, 0), sq=3, causal=True),
    CacheProblem(d=256, dtype=BF16, sq=2, s_new=2, causal=True),
    CacheProblem(d=111, dtype=FP16, sq=2),
    CacheProblem(layout="headsfirst", sq=2, s_new=2, causal=True, dtype=BF16),
    CacheProblem(layout="sliced", sq=2, s_new=2, page=16),
    CacheProblem(sq=60, seqlens=(40, 10), causal=True),
    CacheProblem(sq=4, s_new=4, capacity=3000, seqlens=(2500, 700), page=48, causal=True, d=16),
    CacheProblem(sq=600, s_new=600, capacity=2000, seqlens=(1300, 1), leftpad=(800, 0), d=16),
    CacheProblem(sq=150, s_new=9, capacity=700, seqlens=(600, 1), page=16, causal=True, dtype=BF16),
    CacheProblem(sq=90, capacity=700, seqlens=(700, 0), page=24, dtype=FP16, hk=1, d=111),
]

# Latent attention with its projections absorbed: one wide V, often with a query of its own.
_LATENT = Problem(sq=5, sk=130, d=64, dv=512, qv=True, hq=16, hk=1, dtype=BF16)
_PACKED_LATENT = varlen((1, 65, 0, 30), (70, 65, 30, 200), d=64, dv=512, qv=True, hq=16, hk=1)
LATENT = [
    _LATENT,
    replace(_LATENT, dtype=FP16, causal=True),
    replace(_LATENT, sq=1, sk=300, dv=256),
    replace(_LATENT, sq=65, sk=65, dv=256, causal=True, dtype=FP16),
    replace(_LATENT, sq=130, sk=65, hq=8, hk=2, causal=True),
    replace(_LATENT, sq=130, sk=65, hq=8, hk=2, dv=256, causal=True, dtype=FP16),
    replace(_LATENT, b=1, sq=1, sk=300, hq=128),
    replace(_LATENT, b=1, sq=3, sk=70, hq=128, causal=True, dtype=FP16),
    replace(_LATENT, b=1, sq=2, hq=96, dv=256),
    replace(_LATENT, sq=65, sk=300, hq=8, hk=2, window=(70, 10)),
    replace(_LATENT, sq=65, hq=4, window=(-1, 3), dv=256),
    replace(_LATENT, sq=65, hq=8, hk=2, softcap=15.0, causal=True),
    replace(_LATENT, sq=65, hq=4, attention_chunk=40, causal=True),
    replace(_LATENT, softmax_scale=-0.02, dtype=FP16),
    replace(_LATENT, softmax_scale=0.0),
    replace(_LATENT, d=40, dv=500),
    replace(_LATENT, d=40, dv=200, causal=True, dtype=FP16),
    replace(_LATENT, d=7, dv=59, hq=6, hk=3),
    replace(_LATENT, sk=0),
    *(replace(_LATENT, layout=layout) for layout in ("headsfirst", "sliced", "lastdim")),
    replace(_LATENT, layout="misaligned", dtype=FP16),
    replace(_LATENT, qv=False, sq=130, hq=4, causal=True),
    replace(_LATENT, qv=False, d=40, dv=300, window=(30, 4), dtype=FP16),
    replace(_LATENT, qv=False, sq=1, sk=300),
    replace(_PACKED_LATENT, dtype=BF16, causal=True),
    replace(_PACKED_LATENT, dtype=FP16, dv=256, window=(20, 5)),
    replace(_PACKED_LATENT, dtype=BF16, hq=128, softcap=9.0),
    replace(_PACKED_LATENT, dtype=BF16, used_q=(1, 33, 0, 0), used_k=(7, 65, 30, 131), causal=True),
    replace(_PACKED_LATENT, dtype=FP16, qv=False, hq=4, causal=True),
]

FA3 = [
    *(Problem(sq=67, sk=91, d=64, hq=4, hk=2, causal=True, dtype=dtype) for dtype in DTYPES),
    Problem(sq=67, sk=91, d=192, dv=128, dtype=BF16, causal=True),
    Problem(sq=300, sk=391, d=192, dv=128, dtype=FP16, causal=True),
    Problem(sq=257, sk=130, d=160, dv=72, dtype=BF16, window=(30, 4)),
    Problem(sq=67, sk=91, d=64, dv=256, dtype=BF16, hq=4, hk=1),
    Problem(sq=67, sk=91, d=64, dv=512, dtype=FP16, hq=4, hk=1),
    Problem(sq=67, sk=91, d=40, dv=72, dtype=FP64, window=(30, 4)),
    Problem(sq=67, sk=91, d=72, dv=8, dtype=FP32, softcap=10.0),
    Problem(sq=67, sk=91, d=24, dv=8, dtype=FP16, window=(30, 4)),
    Problem(sq=67, sk=91, attention_chunk=16, dtype=FP32),
    Problem(sq=67, sk=91, attention_chunk=16, dtype=BF16, causal=True),
    Problem(sq=91, sk=67, attention_chunk=32, dtype=FP32, causal=True),
    Problem(sq=5, sk=91, d=64, dv=256, qv=True, dtype=BF16, hq=8, hk=1, causal=True),
    Problem(sq=5, sk=91, d=64, dv=512, qv=True, dtype=FP32, hq=8, hk=1),
    Problem(sq=67, sk=91, d=64, dtype=FP8, hq=4, hk=2),
    Problem(sq=67, sk=91, d=128, dtype=FP8, descale=True, hq=4, hk=2, causal=True),
    Problem(sq=67, sk=91, d=192, dv=128, dtype=FP8, descale=True),
    Problem(sq=69, sk=69, packing="qkv", dtype=BF16, causal=True),
    Problem(sq=69, sk=69, hq=6, hk=2, packing="qkvheads", dtype=FP32, causal=True),
    Problem(sq=69, sk=69, hq=4, hk=1, packing="qkvheads", dtype=BF16, window=(9, 9)),
    Problem(sq=20, sk=0, dtype=FP32),
    Problem(sq=80, sk=90, deterministic=True, dtype=BF16, causal=True),
    varlen((17, 64, 1), (33, 64, 128), d=64, hq=4, hk=2, dtype=BF16, causal=True),
    varlen((17, 64, 1), (33, 64, 128), dtype=FP32, window=(20, 5), softcap=9.0),
    varlen((17, 64, 1), (33, 64, 128), d=192, dv=128, dtype=BF16, causal=True),
    varlen((0, 30, 12), (15, 0, 40), dtype=FP32, causal=True),
    varlen((40, 30, 12), (50, 30, 40), used_q=(33, 30, 0), dtype=FP32),
    varlen((40, 30, 12), (50, 30, 40), used_k=(50, 7, 0), dtype=BF16, causal=True),
    varlen(
        (40, 30, 12), (50, 30, 40), used_q=(33, 0, 12), used_k=(20, 30, 31), dtype=FP64, causal=True
    ),
    varlen(
        (40, 30, 12), (50, 30, 40), used_q=(40, 1, 3), used_k=(20, 3, 31), dtype=BF16, hq=4, hk=2
    ),
    varlen((700, 30), (900, 600), used_q=(600, 30), used_k=(700, 590), d=16, dtype=FP32),
    varlen((40, 30), (50, 30), attention_chunk=9, dtype=FP32, causal=True),
    Problem(b=1, sq=600, sk=1100, d=16, attention_chunk=257, dtype=FP32, causal=True),
    varlen((3, 5), (50, 30), d=64, dv=256, qv=True, hq=4, hk=1, dtype=BF16),
    varlen((40, 30), (50, 30), d=64, dtype=FP8, descale=True, hq=4, hk=2, causal=True),
    *LATENT,
]

_OVER_FP8 = CacheProblem(dtype=BF16, cache_dtype=FP8, d=128, descale=True, sq=3, causal=True)
FP8_KVCACHE = [
    CacheProblem(dtype=FP8, sq=3, causal=True),
    CacheProblem(dtype=FP8, sq=3, page=16, descale=True),
    CacheProblem(dtype=FP8, sq=2, s_new=2, causal=True, descale=True, d=128),
    _OVER_FP8,
    replace(_OVER_FP8, dtype=FP16),
    replace(_OVER_FP8, seqlens=None, sq=1),
    replace(_OVER_FP8, s_new=3),
    replace(_OVER_FP8, s_new=3, page=16, dtype=FP16),
    replace(_OVER_FP8, s_new=5, page=7, d=64, descale=False),
    replace(_OVER_FP8, page=1, leftpad=(17, 33)),
    replace(_OVER_FP8, b=3, seqlens=(3, 40, 97), batch_idx=(4, 0, 2), s_new=1),
    replace(_OVER_FP8, window=(30, 0), softcap=15.0),
    replace(_OVER_FP8, d=256, softmax_scale=-0.1, attention_chunk=30),
    replace(_OVER_FP8, d=192, dv=128, num_splits=3),
    replace(_OVER_FP8, hq=32, hk=2, d=96),
    replace(_OVER_FP8, d=72, dv=40, s_new=2),
    replace(_OVER_FP8, d=59, dtype=FP16),
    replace(_OVER_FP8, lens_q=(4, 9), lens_new=(6, 2)),
    replace(_OVER_FP8, layout="headsfirst", s_new=1),
]

_LATENT_STEP = CacheProblem(dtype=BF16, d=64, dv=512, qv=True, hq=16, hk=1, causal=True)
LATENT_KVCACHE = [
    _LATENT_STEP,
    replace(_LATENT_STEP, dtype=FP16, dv=256, sq=5),
    replace(_LATENT_STEP, hq=128, sq=2),
    replace(_LATENT_STEP, hq=8, hk=2, sq=65, causal=False),
    replace(_LATENT_STEP, seqlens=None),
    replace(_LATENT_STEP, seqlens=(0, 128)),
    replace(_LATENT_STEP, page=1, sq=3),
    replace(_LATENT_STEP, page=7, sq=3, dv=256),
    replace(_LATENT_STEP, page=16, dtype=FP16),
    replace(_LATENT_STEP, page=64, capacity=300, seqlens=(280, 3), sq=2),
    replace(_LATENT_STEP, page=64, capacity=300, seqlens=(280, 3), dv=256, hq=128),
    replace(_LATENT_STEP, page=256, capacity=300, seqlens=(280, 3)),
    replace(_LATENT_STEP, page=64, batch_idx=(2, 0)),
    replace(_LATENT_STEP, batch_idx=(2, 0), sq=3),
    replace(_LATENT_STEP, leftpad=(17, 33), sq=3),
    replace(_LATENT_STEP, leftpad=(17, 33), page=64),
    replace(_LATENT_STEP, leftpad=(40, 97)),
    replace(_LATENT_STEP, sq=3, s_new=3, rotary_dim=64),
    replace(_LATENT_STEP, sq=3, s_new=3, rotary_dim=32, interleaved=False, page=64, dtype=FP16),
    replace(_LATENT_STEP, s_new=1, page=16, rotary_dim=64, rotary_seqlens=(7, 60), hq=128),
    replace(_LATENT_STEP, lens_q=(4, 9)),
    replace(_LATENT_STEP, lens_q=(1, 70), lens_new=(6, 2), page=64),
    replace(_LATENT_STEP, num_splits=3, capacity=300, seqlens=(280, 3), sq=3),
    replace(_LATENT_STEP, num_splits=5, capacity=300, seqlens=(280, 0), page=64, dv=256),
    replace(_LATENT_STEP, b=1, capacity=2100, seqlens=(2000,)),
    replace(_LATENT_STEP, window=(30, 0), softcap=15.0, sq=4),
    replace(_LATENT_STEP, attention_chunk=30, sq=4, page=64),
    replace(_LATENT_STEP, d=40, dv=500, sq=2, s_new=2, dtype=FP16),
    replace(_LATENT_STEP, d=40, dv=500, sq=2, s_new=2, page=16),
    replace(_LATENT_STEP, qv=False, sq=3, page=64),
    replace(_LATENT_STEP, qv=False, sq=70, s_new=2),
    replace(_LATENT_STEP, layout="headsfirst", hk=2, s_new=1),
]

_ONE_STEP = CacheProblem(dtype=BF16, sq=4, s_new=4, causal=True)
FA3_KVCACHE = [
    CacheProblem(dtype=BF16),
    _ONE_STEP,
    replace(_ONE_STEP, page=16, dtype=FP32),
    replace(_ONE_STEP, page=7, batch_idx=(2, 0), dtype=FP32),
    replace(_ONE_STEP, lens_q=(4, 9)),
    replace(_ONE_STEP, lens_q=(4, 9), lens_new=(6, 2), dtype=FP32),
    replace(_ONE_STEP, lens_q=(1, 3), lens_new=(0, 5), page=16, dtype=FP32),
    replace(_ONE_STEP, rotary_dim=32, rotary_seqlens=(7, 60)),
    replace(_ONE_STEP, lens_q=(4, 9), lens_new=(6, 2), rotary_dim=32, interleaved=False),
    replace(_ONE_STEP, lens_q=(4, 9), rotary_dim=64, rotary_seqlens=(0, 3), dtype=FP32),
    replace(_ONE_STEP, leftpad=(11, 60), page=16),
    replace(_ONE_STEP, dv=128, d=192),
    replace(_ONE_STEP, attention_chunk=16, dtype=FP32),
    replace(_ONE_STEP, causal=False, attention_chunk=16, rotary_dim=32, dtype=FP32),
    replace(_ONE_STEP, causal=False, rotary_dim=32, rotary_seqlens=(7, 60), page=7),
    replace(_ONE_STEP, leftpad=(11, 60), batch_idx=(2, 0), page=7, rotary_dim=32, dtype=FP32),
    replace(_ONE_STEP, window=(12, 0), softcap=11.0, num_splits=3),
    replace(_ONE_STEP, qv=True, dv=256, hq=8, hk=1, dtype=FP32),
    CacheProblem(dtype=FP32, seqlens=(50, 50), scalar_seqlen=True, page=16),
    *FP8_KVCACHE,
    *LATENT_KVCACHE,
]
