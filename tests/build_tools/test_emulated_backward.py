"""Hopper's backward kernels on a CPU, as `test_emulated.py` has the forward ones.

Gradients, and all rows that nobody may read, are NaN before the call.
"""

from __future__ import annotations

import pytest
from emulated import BACKWARD_HEAD_DIMS, answers
from native_tools import Stub

PROGRAM = """
def call(dout, q, k, v, out, lse, grads, cu, used, max_seqlens, causal, window, softcap, slopes,
         scale, deterministic):
    torch.ops.flash_attn_cuda.backward.default.redispatch(
        CUDA, dout, q, k, v, out, lse, *grads, *cu, *used, *max_seqlens, 0.0, scale, False,
        window[0], 0 if causal else window[1], softcap, slopes, deterministic, None)

# `sequences`: where the rows of each stand in q, in k and in lse.
def judge(q, k, v, lse, sequences, grads=None, cu=(None, None), used=(None, None),
          max_seqlens=(None, None), causal=False, window=(-1, -1), softcap=0.0, slopes=None,
          scale=None, layout=None, deterministic=False):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rule = dict(causal=causal, window=window, softcap=softcap, alibi_slopes=slopes,
                softmax_scale=scale)
    dout = strided(make(*q.shape[:-1], v.shape[-1]), layout)
    inputs = (q, k, v)
    exact, rough = ([torch.zeros(x.shape, dtype=t) for x in inputs] for t in (torch.float64, DTYPE))
    out, in_use = torch.full_like(dout, math.nan), [torch.zeros(x.shape[:-2]) for x in inputs]
    for at_q, at_k, at_lse in sequences:
        places = (at_q, at_k, at_k)
        for rows, at in zip(in_use, places):
            rows[at] = 1
        for dtype, expected in ((torch.float64, exact), (DTYPE, rough)):
            leaves = [x[at].to(dtype).requires_grad_() for x, at in zip(inputs, places)]
            o, l = attention(*[x[None] for x in leaves], dtype=dtype, **rule)
            found = torch.autograd.grad(o[0], leaves, dout[at_q].to(dtype))
            for to, at, x in zip(expected, places, found):
                to[at] = x
            if dtype == torch.float64:
                out[at_q], lse[at_lse] = o[0].detach().to(DTYPE), l[0].detach().float()
    for x, rows in zip((*inputs, dout), (*in_use, in_use[0])):
        x[rows == 0] = math.nan
    if grads is None:
        grads = [torch.full_like(x, math.nan) for x in inputs]
    call(dout, q, k, v, out, lse, grads, cu, used, max_seqlens, causal, window, softcap, slopes,
         scale, deterministic)
    for name, *x in zip(("dq", "dk", "dv"), grads, exact, rough):
        check(name, *x)

def strided(x, layout):
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "wide rows":
        return torch.cat((x, make(*x.shape[:-1], 24)), -1)[..., : x.shape[-1]]
    return x

def dense(d, sq, sk, hq=2, hk=1, b=1, dv=None, used_q=None, used_k=None, layout=None, **options):
    grads = None
    if layout == "one tensor":
        q, k, v = make(b, sq, 3, hq, d).unbind(2)
        grads = torch.full((b, sq, 3, hq, d), math.nan, dtype=DTYPE).unbind(2)
    else:
        shapes = (b, sq, hq, d), (b, sk, hk, d), (b, sk, hk, dv or d)
        q, k, v = (strided(make(*shape), layout) for shape in shapes)
    lse = torch.full((b, hq, sq), math.nan)
    rows_q, rows_k = used_q or [sq] * b, used_k or [sk] * b
    sequences = [((i, slice(m)), (i, slice(n)), (i, slice(None), slice(m)))
                 for i, (m, n) in enumerate(zip(rows_q, rows_k))]
    used = [x and torch.tensor(x, dtype=torch.int32) for x in (used_q, used_k)]
    judge(q, k, v, lse, sequences, grads, used=used, layout=layout, **options)

def packed(d, lens_q, lens_k, hq=2, hk=1, used_q=None, used_k=None, **options):
    cu = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
          for x in (lens_q, lens_k)]
    # There are rows behind the last sequence.
    keys = sum(lens_k) + 5
    q, k, v = make(sum(lens_q) + 3, hq, d), make(keys, hk, d), make(keys, hk, d)
    lse = torch.full((hq, len(q)), math.nan)
    sequences = []
    for i, (m, n) in enumerate(zip(used_q or lens_q, used_k or lens_k)):
        rows = slice(int(cu[0][i]), int(cu[0][i]) + m)
        sequences.append((rows, slice(int(cu[1][i]), int(cu[1][i]) + n), (slice(None), rows)))
    used = [x and torch.tensor(x, dtype=torch.int32) for x in (used_q, used_k)]
    longest = max(lens_q), max(lens_k)
    judge(q, k, v, lse, sequences, cu=cu, used=used, max_seqlens=longest, **options)
"""
CASES = {
    "one_row": "dense({d}, 1, 1)",
    "below_a_block": "dense({d}, 63, 65)",
    "above_a_block": "dense({d}, 65, 63, causal=True)",
    "below_two_blocks": "dense({d}, 127, 129)",
    "above_two_blocks": "dense({d}, 129, 127, causal=True)",
    "ragged": "dense({d}, 200, 333, b=2)",
    "full": "dense({d}, 256, 640, hq=4, hk=2)",
    "causal": "dense({d}, 300, 300, hq=4, hk=2, causal=True)",
    "causal_more_keys": "dense({d}, 257, 640, hk=2, causal=True)",
    "rows_without_keys": "dense({d}, 400, 100, causal=True)",
    "tiles_without_keys": "dense({d}, 450, 130, causal=True, deterministic=True)",
    "keys_without_rows": "dense({d}, 200, 600, window=(64, -1))",
    "most_keys_without_rows": "dense({d}, 70, 3000, hk=2, window=(64, -1))",
    # CTAs side by side add to the same sums.
    "one_block_of_queries": "dense({d}, 60, 900, hq=4, hk=4)",
    "window": "dense({d}, 400, 400, window=(100, 30))",
    "softcap": "dense({d}, 200, 200, softcap=10.0, causal=True)",
    "alibi": "dense({d}, 200, 290, slopes=torch.tensor([0.1, 0.4]))",
    "alibi_softcap_window": (
        "dense({d}, 200, 200, softcap=10.0, slopes=torch.tensor([0.1, 0.4]), window=(120, 0))"
    ),
    "negative_scale": "dense({d}, 150, 200, scale=-0.1)",
    "large_scores": "dense({d}, 150, 200, scale=2.0)",
    "small_scores": "dense({d}, 150, 200, scale=1e-6)",
    "narrow_v": "dense({d}, 150, 270, dv={d} - 24)",
    "odd_head_dim": "dense({d} - 8, 150, 270, causal=True)",
    "used": "dense({d}, 200, 300, b=3, used_q=[200, 17, 0], used_k=[300, 129, 5])",
    "heads_first": "dense({d}, 140, 200, b=2, hk=2, layout='heads first')",
    "wide_rows": "dense({d}, 140, 200, b=2, layout='wide rows')",
    "one_tensor": "dense({d}, 140, 140, b=2, hk=2, layout='one tensor')",
    "packed": "packed({d}, (100, 0, 200, 1, 64), (100, 50, 333, 257, 0))",
    "packed_causal": "packed({d}, (130, 5, 256), (130, 300, 256), causal=True)",
    "packed_used": (
        "packed({d}, (130, 7, 256), (130, 300, 256), hk=2, used_q=[129, 5, 70], used_k=[1, 290, 0])"
    ),
    "deterministic": "dense({d}, 256, 384, hq=4, hk=2, deterministic=True)",
    "deterministic_causal": "dense({d}, 200, 430, causal=True, deterministic=True)",
    "deterministic_window": "dense({d}, 300, 300, window=(90, 20), deterministic=True)",
    "deterministic_packed": (
        "packed({d}, (130, 0, 200), (130, 50, 333), causal=True, deterministic=True)"
    ),
    # Of several sections, whose sums are zeroed by the blocks of the one in front.
    "long": "dense({d}, 130, 1000, hq=24, hk=3)",
    "long_causal": "dense({d}, 260, 930, b=2, hq=8, causal=True)",
    "long_window": "dense({d}, 200, 1024, b=3, hq=8, window=(300, 20))",
    "long_in_turn": "dense({d}, 140, 900, b=2, hq=16, window=(-1, 64), deterministic=True)",
}


# Of V with at most 128 columns beside wider Q and K.
NARROW = {
    "ragged": "dense(192, 200, 333, b=2, dv=128)",
    "full": "dense(192, 256, 640, hq=4, hk=2, dv=128)",
    "causal": "dense(192, 300, 300, hq=4, hk=2, dv=128, causal=True)",
    "narrower": "dense(160, 150, 270, dv=72, causal=True)",
    "window": "dense(192, 400, 400, dv=128, window=(100, 30))",
    "softcap": "dense(192, 200, 200, dv=128, softcap=10.0, causal=True)",
    "used": "dense(192, 200, 300, b=3, dv=128, used_q=[200, 17, 0], used_k=[300, 129, 5])",
}


@pytest.fixture(scope="module")
def told_of_narrow(
    machine: Stub, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """What each case of a narrow V came to."""
    log = tmp_path_factory.mktemp("narrow") / "log"
    results, launched = answers(machine, log, PROGRAM, NARROW, (192,))
    kernels = {f"flash_{kind}_sm90_narrow_d192_bf16" for kind in ("bwd", "dq")}
    assert launched == kernels | {"flash_delta_bf16", "flash_fill_bf16"}
    return results


@pytest.mark.parametrize("name", NARROW)
def test_narrow_values_take_no_columns_that_are_none(
    told_of_narrow: dict[tuple[int, str], str], name: str
) -> None:
    assert told_of_narrow[192, name] == ""


@pytest.fixture(scope="module")
def told(machine: Stub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """What each case came to."""
    log = tmp_path_factory.mktemp("log") / "log"
    results, launched = answers(machine, log, PROGRAM, CASES, BACKWARD_HEAD_DIMS)
    kernels = {f"flash_bwd_sm90_d{d}_bf16" for d in BACKWARD_HEAD_DIMS}
    kernels |= {f"flash_convert_sm90_d{d}_bf16" for d in BACKWARD_HEAD_DIMS if d <= 128}
    kernels |= {f"flash_dq_sm90_d{d}_bf16" for d in BACKWARD_HEAD_DIMS if d > 128}
    assert launched == kernels | {"flash_delta_bf16", "flash_fill_bf16"}
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", BACKWARD_HEAD_DIMS)
def test_hoppers_kernels_compute_gradients(
    told: dict[tuple[int, str], str], d: int, name: str
) -> None:
    assert told[d, name] == ""
