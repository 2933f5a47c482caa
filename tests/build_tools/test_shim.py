"""The torch shim without a GPU (shim_runs.py): FlashAttention-2's operators, caches, the build."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from native_tools import (
    ROOT,
    ForwardHead,
    Launch,
    Rows,
    Stub,
    launches,
    lay_out_kernels,
    native,
    needs,
)
from shim_runs import run

from build_tools import elf
from build_tools.audit_native import MANYLINUX_2_28


def test_the_backend_says_what_was_built(installed: Stub, tmp_path: Path) -> None:
    text = """
def why(dtype="bfloat16", d=128, features=(), cc=(9, 0)):
    return cuda.why_not(Problem("cuda", dtype, d, d, frozenset(features), cc))
cache = ["kv_append", "varlen", "seqused", "rotary", "paged_kv"]
print(json.dumps([why(), why(features=["backward"]), why(features=cache), why(d=320)]))
"""
    *served, too_wide = run(installed, tmp_path / "log", text)
    assert served == [[], [], []]
    assert too_wide == [
        "takes qv, and V wider than 256, beside head dims of q and k up to 64, not 320"
    ]


def test_a_package_without_kernels_says_how_to_get_them(installed: Stub, tmp_path: Path) -> None:
    text = """
from flash_attn import backends
backends.triton.is_installed = lambda: False
cuda._HOST, cuda._WHY_NOT_LOADED = None, "nothing was built"
problem = Problem("cuda", "bfloat16", 64, 64, frozenset(["causal"]), (9, 0))
parts = torch.zeros(2, 1, 4, 1, 8), torch.zeros(2, 1, 4, 1)
print(json.dumps([told(lambda: backends.choose(problem)), told(lambda: cuda.combine(*parts))]))
"""
    for kind, words in run(installed, tmp_path / "log", text):
        assert kind == "RuntimeError"
        assert "nothing was built" in words
        assert "build the CUDA kernels for this machine (docs/building.md)" in words


def test_a_forward_call_reaches_the_driver_without_copies(installed: Stub, tmp_path: Path) -> None:
    text = """
q, kv = make(2, 300, 4, 64), make(2, 200, 2, 2, 64)
k, v = kv.unbind(2)
out, lse, s_dmask, rng_state = forward(q, k, v, causal=True)
print(json.dumps([[x.data_ptr() for x in (q, k, v, out, lse)],
                  [list(x.shape) for x in (out, lse, s_dmask, rng_state)]]))
"""
    pointers, shapes = run(installed, tmp_path / "log", text)
    (launch,) = launches(tmp_path / "log")
    head = ForwardHead.from_buffer_copy(launch.params)
    rows = [head.q, head.k, head.v, head.o]
    assert [x.ptr for x in rows] + [head.lse] == pointers
    assert [(x.batch, x.row, x.head) for x in rows[:2]] == [
        (300 * 256, 256, 64),
        (200 * 256, 256, 64),
    ]
    assert (head.lse_batch, head.lse_head) == (4 * 300, 300)
    assert shapes == [[2, 300, 4, 64], [2, 4, 300], [0], [2]]
    assert (launch.stream, launch.context) == (0x5700, 0)


def test_odd_head_dims_and_strides_are_made_fit(installed: Stub, tmp_path: Path) -> None:
    text = """
q = make(1, 32, 2, 20)
odd = make(1, 32, 2, 65)[..., 1:]
outs = [forward(q, q, q)[0], forward(odd, odd, odd)[0]]
print(json.dumps([[list(x.shape), x.is_contiguous()] for x in outs]))
"""
    shapes = run(installed, tmp_path / "log", text)
    assert shapes == [[[1, 32, 2, 20], True], [[1, 32, 2, 64], True]]
    for launch, row in zip(launches(tmp_path / "log"), (48, 128)):
        head = ForwardHead.from_buffer_copy(launch.params)
        assert (head.q.row, head.q.ptr % 16) == (row, 0)


def test_a_backward_call_runs_three_kernels_and_fills_what_is_given(
    installed: Stub, tmp_path: Path
) -> None:
    text = """
q, k = make(2, 100, 4, 64), make(2, 100, 2, 64)
out, lse, _, _ = forward(q, k, k)
dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), None
rules = (0.0, 0.5, False, -1, -1, 0.0, None, False, None)
d = direct("_flash_attn_backward", out, q, k, k, out, lse, dq, dk, dv, *rules)
odd = make(2, 100, 4, 20)
grads = [torch.full_like(odd, 7) for _ in range(3)]
direct("_flash_attn_backward", odd, odd, odd, odd, odd, lse, *grads, *rules)
print(json.dumps([list(d.shape), list(grads[0].shape)]))
"""
    shapes = run(installed, tmp_path / "log", text)
    assert shapes == [[2, 4, 128], [2, 100, 4, 20]]
    kernels = [launch.kernel for launch in launches(tmp_path / "log")]
    step = ["flash_delta_bf16", "flash_bwd_sm80_d64_bf16", "flash_convert_sm80_d64_bf16"]
    assert kernels == ["flash_fwd_sm80_d64_bf16", *step, *step]


def test_packed_sequences_have_packed_shapes(installed: Stub, tmp_path: Path) -> None:
    text = """
q = make(50, 2, 64)
cu = torch.tensor([0, 20, 50], dtype=torch.int32)
tail = (0.0, 0.5, True, -1, -1, 0.0, None)
out, lse, _, _ = direct("_flash_attn_varlen_forward", q, q, q, cu, cu, 30, 30, *tail, False, None,
                        None, None, False)
d = direct("_flash_attn_varlen_backward", out, q, q, q, out, lse, None, None, None, cu, cu, 30, 30,
           *tail, True, None, False)
print(json.dumps([list(x.shape) for x in (out, lse, d)]))
"""
    assert run(installed, tmp_path / "log", text) == [[50, 2, 64], [2, 50], [2, 50 + 256]]
    kernels = [launch.kernel for launch in launches(tmp_path / "log")]
    # Rows that belong to no sequence are filled: of the output, then of dq, then of dk and dv.
    forward = ["flash_fill_bf16", "flash_fwd_sm80_d64_bf16"]
    backward = ["flash_delta_bf16", "flash_bwd_sm80_d64_bf16", "flash_convert_sm80_d64_bf16"]
    assert kernels == [*forward, *backward, "flash_fill_bf16", "flash_fill_bf16"]


def test_s_dmask_has_a_kernel_of_its_own(installed: Stub, tmp_path: Path) -> None:
    text = """
q, k = make(2, 100, 4, 64), make(2, 130, 4, 64)
s_dmask = forward(q, k, k, p=0.2, s_dmask=True)[2]
print(json.dumps([list(s_dmask.shape), s_dmask.abs().max().item()]))
"""
    assert run(installed, tmp_path / "log", text) == [[2, 4, 128, 256], 0.0]
    _, s_dmask = launches(tmp_path / "log")
    assert s_dmask.kernel == "flash_s_dmask_bf16"
    assert s_dmask.grid == 2 * 2 * 4


CACHE = """
lens = torch.tensor([0, 9], dtype=torch.int32)
def decode(q, k_cache, v_cache, k=None, v=None, cos=None, table=None, splits=1, **others):
    return direct("_flash_attn_with_kvcache", q, k_cache, v_cache, k, v, None, cos, cos, lens, None,
                  None, table, others.get("cu_q"), others.get("cu_new"), None, None, None, None,
                  None, 0.5, True, -1, -1, 0, 0.0, True, None, splits)
"""


def test_an_append_comes_before_the_attention(installed: Stub, tmp_path: Path) -> None:
    text = (
        CACHE
        + """
q, new, cache, cos = make(2, 33, 4, 64), make(2, 5, 2, 64), make(2, 40, 2, 64), make(50, 16)
out, lse = decode(q, cache, cache, new, new, cos)
decode(q, cache, cache)
print(json.dumps([[list(out.shape), list(lse.shape)], cache.data_ptr()]))
"""
    )
    shapes, cache = run(installed, tmp_path / "log", text)
    assert shapes == [[2, 33, 4, 64], [2, 4, 33]]
    append, attention, plain = launches(tmp_path / "log")
    assert (append.kernel, plain.kernel) == ("flash_append_bf16", "flash_fwd_sm80_d64_bf16")
    # A warp a row and head: 5 new rows of 2 heads and 33 queries of 4, of 2 sequences.
    assert append.grid == (5 * 2 + 33 * 4) * 2 // 4
    with_append, without = (ForwardHead.from_buffer_copy(x.params) for x in (attention, plain))
    assert with_append.k.ptr == without.k.ptr == cache
    assert with_append.q.ptr != without.q.ptr


def test_few_queries_append_rotate_and_attend_in_one_launch(
    installed: Stub, tmp_path: Path
) -> None:
    text = (
        CACHE
        + """
q, new, cache, cos = make(2, 3, 4, 64), make(2, 5, 2, 64), make(2, 40, 2, 64), make(50, 16)
out, lse = decode(q, cache, cache, new, new, cos)
print(json.dumps([[list(out.shape), list(lse.shape)], [q.data_ptr(), cache.data_ptr()]]))
"""
    )
    shapes, pointers = run(installed, tmp_path / "log", text)
    assert shapes == [[2, 3, 4, 64], [2, 4, 3]]
    (launch,) = launches(tmp_path / "log")
    assert launch.kernel == "flash_fwd_decode_d64_bf16"
    params = ForwardHead.from_buffer_copy(launch.params)
    assert [params.q.ptr, params.k.ptr] == pointers


FP8_CACHE = """
E4M3, ones = torch.float8_e4m3fn, torch.ones(2, 2)
def step(run, q, k_cache, v_cache, k=None, v=None, cos=None, table=None, descale=(None,) * 3):
    return run(q, k_cache, v_cache, k, v, None, cos, cos, torch.tensor([0, 9]).int(), None, None,
               table, None, None, None, None, *descale, 0.5, True, -1, -1, 0, 0.0, True, None, 0)
def served(*arguments):
    return direct("_flash_attn_with_kvcache", *arguments)
q, cache = make(2, 3, 4, 64), make(2, 40, 2, 64).to(E4M3)
new = make(2, 5, 2, 64).to(E4M3)
"""


def test_few_queries_of_every_dtype_run_over_an_fp8_cache(installed: Stub, tmp_path: Path) -> None:
    text = (
        FP8_CACHE
        + """
factors = (None, ones, ones)
outs = [step(served, q.to(t), cache, cache, new, new, descale=factors)[0]
        for t in (torch.bfloat16, torch.float16, E4M3)]
long = make(2, 33, 4, 64)
refused = told(lambda: step(served, long, cache, cache))
table = torch.zeros(2, 1).int()
paged = told(lambda: step(served, long.to(E4M3), cache, cache, table=table))
print(json.dumps([[str(x.dtype) for x in outs], refused, paged]))
"""
    )
    dtypes, refused, paged = run(installed, tmp_path / "log", text)
    assert dtypes == ["torch.bfloat16", "torch.float16", "torch.bfloat16"]
    assert {x.kernel for x in launches(tmp_path / "log")} == {"flash_fwd_decode_d64_e4m3"}
    rule = "go with at most 64 rows of queries, here 33 queries times 2 heads"
    op = "flash_attn::_flash_attn_with_kvcache: FP8 keys with"
    assert refused == ["RuntimeError", f"{op} queries of 16 bits {rule}"]
    assert paged == ["RuntimeError", f"{op} a block_table {rule}"]


BAD_FP8_CACHES = {
    "values": "q, cache, cache.bfloat16()",
    "new rows": "q, cache, cache, new.bfloat16(), new.bfloat16()",
    "rotation": "q, cache, cache, new, new, make(50, 16)",
    "factor of q": "q, cache, cache, descale=(ones, None, None)",
    "factor of k": "q, cache.bfloat16(), cache.bfloat16(), descale=(None, ones, None)",
    "factor's shape": "q, cache, cache, descale=(None, None, ones[:1])",
    "factor's dtype": "q, cache, cache, descale=(None, None, ones.bfloat16())",
}


def test_every_rule_of_fp8_caches_is_told_as_python_tells_it(
    installed: Stub, tmp_path: Path
) -> None:
    text = f"""
{FP8_CACHE}
calls = {{name: eval(f"lambda run: step(run, {{words}})")
         for name, words in {BAD_FP8_CACHES!r}.items()}}
print(json.dumps({{name: [told(lambda: call(run)) for run in (served, ops._flash_attn_with_kvcache)]
                   for name, call in calls.items()}}))
"""
    for name, (here, python) in run(installed, tmp_path / "log", text).items():
        assert here is not None, name
        assert here == python, name


@pytest.fixture(scope="module")
def hopper(installed: Stub, tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """The same with Hopper's own kernels."""
    folder = tmp_path_factory.mktemp("hopper")
    shutil.copytree(installed.folder, folder, dirs_exist_ok=True)
    lay_out_kernels(folder / "flash_attn" / "kernels", ("80", "90", "90a"))
    return Stub(folder)


LATENT = """
E4M3, lens = torch.float8_e4m3fn, torch.tensor([3, 40]).int()
def step(run, q, k, v, qv, k_new=None, v_new=None, cos=None, table=None):
    return run(q, k, v, k_new, v_new, qv, cos, cos, lens, None, None, table, *[None] * 7, 0.5, True,
               -1, -1, 0, 0.0, True, None, 1)
def served(*arguments):
    return direct("_flash_attn_with_kvcache", *arguments)
def rows(x):
    return [x.data_ptr(), *(x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2]))]
q, qv, k, v = make(2, 3, 16, 64), make(2, 3, 16, 512), make(2, 70, 1, 64), make(2, 70, 1, 512)
"""


def rows_of(x: Rows) -> list[int]:
    return [x.ptr, x.batch, x.row, x.head]


def at_head(launch: Launch, k: list[int]) -> int:
    """Where the call stands behind the tensor maps, found by its keys."""
    return launch.params.index(bytes(Rows(*k))) - ForwardHead.k.offset


class SecondQuery(ctypes.Structure):
    """The last fields of flash::ForwardParams."""

    _fields_ = [("rows", Rows), ("is_given", ctypes.c_int32)]


def second_query(launch: Launch, at: int) -> tuple[list[int], int]:
    found = SecondQuery.from_buffer_copy(launch.params, at)
    return rows_of(found.rows), found.is_given


def test_a_second_query_reaches_the_driver_without_copies(hopper: Stub, tmp_path: Path) -> None:
    text = (
        LATENT
        + """
out, lse = step(served, q, k, v, qv)
cuda.forward(Forward(q, k, v, Scores(0.5), qv=qv), "f")
wide = forward(q, k, v)[0]
cu = torch.tensor([0, 2, 3]).int()
packed = q[0], k[0], v[0], Scores(0.5), Sequences(cu, cu, max_seqlen_q=2, max_seqlen_k=2)
cuda.forward(Forward(*packed, qv=qv[0]), "f")
print(json.dumps([[rows(x) for x in (q, k, v, qv)], rows(qv[0]),
                  [list(x.shape) for x in (out, lse, wide)]]))
"""
    )
    given, packed, shapes = run(hopper, tmp_path / "log", text)
    assert shapes == [[2, 3, 16, 512], [2, 16, 3], [2, 3, 16, 512]]
    attention = [x for x in launches(tmp_path / "log") if x.kernel != "flash_fill_bf16"]
    assert {x.kernel for x in attention} == {"flash_fwd_sm90_latent_d512_bf16"}
    at = at_head(attention[0], given[1])
    behind = attention[0].params.index(bytes(Rows(*given[3])))
    for launch in attention[:3]:
        head = ForwardHead.from_buffer_copy(launch.params, at)
        assert [rows_of(x) for x in (head.q, head.k, head.v)] == given[:3]
    found = [second_query(launch, behind) for launch in attention]
    assert found == [(given[3], 1), (given[3], 1), ([0] * 4, 0), (packed, 1)]


def test_a_second_query_is_made_fit_as_v_is(hopper: Stub, tmp_path: Path) -> None:
    text = (
        LATENT
        + """
step(served, q, k, v, qv)
kept = rows(k), rows(qv)
q, k = make(2, 3, 16, 40), make(2, 70, 1, 40)
outs = [step(served, q, k, v[..., :n], qv[..., 1:n + 1], make(2, 1, 1, 40), make(2, 1, 1, n),
             make(80, 16))[0] for n in (500, 250)]
print(json.dumps([[list(x.shape) for x in outs], [q.data_ptr(), qv.data_ptr()], rows(k), kept]))
"""
    )
    shapes, given, keys, (kept_keys, kept_query) = run(hopper, tmp_path / "log", text)
    assert shapes == [[2, 3, 16, 500], [2, 3, 16, 250]]
    plain, append, first, _, second = launches(tmp_path / "log")
    behind = plain.params.index(bytes(Rows(*kept_query))) - at_head(plain, kept_keys)
    assert append.kernel == "flash_append_bf16"
    assert [x.kernel for x in (first, second)] == [
        "flash_fwd_sm90_latent_d512_bf16",
        "flash_fwd_sm90_latent_d256_bf16",
    ]
    for launch, padded in ((first, 504), (second, 256)):
        # Queries are rotated, the second ones are not; padded rows are in memory of their own.
        at = at_head(launch, keys)
        head = ForwardHead.from_buffer_copy(launch.params, at)
        (pointer, *strides), _ = second_query(launch, at + behind)
        assert strides == [3 * 16 * padded, 16 * padded, padded]
        assert (pointer % 16, head.v.row) == (0, padded)
        assert not {head.q.ptr, pointer} & {*given}


def test_latent_attention_runs_over_repeated_rows_and_over_none(
    hopper: Stub, tmp_path: Path
) -> None:
    text = (
        LATENT
        + """
once = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v, qv)]
step(served, *once)
outs = [step(served, *x)[0] for x in ((q, k[:, :0], v[:, :0], qv), (q[:, :0], k, v, qv[:, :0]))]
outs.append(forward(q, k[:, :0], v[:, :0])[0])
print(json.dumps([[*x.shape, x.abs().sum().item()] for x in outs] + [[x.data_ptr() for x in once]]))
"""
    )
    *outs, pointers = run(hopper, tmp_path / "log", text)
    assert outs == [[2, 3, 16, 512, 0.0], [2, 0, 16, 512, 0.0], [2, 3, 16, 512, 0.0]]
    repeated, *others = launches(tmp_path / "log")
    assert repeated.kernel == "flash_fwd_sm90_latent_d512_bf16"
    for pointer in pointers:
        assert pointer.to_bytes(8, "little") not in repeated.params
    # Which write the log-sum-exp.
    assert len(others) == 2
    assert not any("latent" in x.kernel for x in others)


BAD_LATENT = {
    "shape": "q, k, v, qv[..., :64]",
    "rows": "q, k, v, qv[:, :2]",
    "rank": "q, k, v, qv[0]",
    "dtype": "q, k, v, qv.half()",
    "fp8": "q.to(E4M3), k.to(E4M3), v.to(E4M3), qv.to(E4M3)",
    "v": "q, k, make(2, 70, 1, 520), None",
    "wide q": "make(2, 3, 16, 72), make(2, 70, 1, 72), v, None",
    "new rows": "q, k, v, qv, make(2, 3, 1, 64), make(2, 3, 1, 64)",
}


def test_every_rule_of_a_second_query_is_told_as_python_tells_it(
    hopper: Stub, tmp_path: Path
) -> None:
    text = f"""
{LATENT}
calls = {{name: eval(f"lambda run: step(run, {{words}})")
         for name, words in {BAD_LATENT!r}.items()}}
print(json.dumps({{name: [told(lambda: call(run)) for run in (served, ops._flash_attn_with_kvcache)]
                   for name, call in calls.items()}}))
"""
    for name, (here, python) in run(hopper, tmp_path / "log", text).items():
        assert here is not None, name
        assert here == python, name


def test_what_gpus_lack_for_latent_attention_is_told(hopper: Stub, tmp_path: Path) -> None:
    text = (
        LATENT
        + """
q8, k8, v8 = (x.to(E4M3) for x in (q, k, v))
wide = make(2, 3, 16, 72), make(2, 70, 1, 72)
print(json.dumps([told(call) for call in (
    lambda: step(served, q, k, v, qv),
    lambda: forward(q, k, v),
    lambda: forward(q, k, v, p=0.1),
    lambda: step(served, q, k8, v8, qv),
    lambda: step(served, q8, k8, v8, None),
    lambda: step(served, *wide, v[..., :72], qv[..., :72]),
    lambda: direct("_flash_attn_backward", qv, q, k, v, qv, torch.ones(2, 16, 3), None, None, None,
                   0.0, 0.5, False, -1, -1, 0.0, None, False, None),
)]))
"""
    )
    cache, dense = "flash_attn::_flash_attn_with_kvcache", "flash_attn::_flash_attn_forward"
    there = "has CUDA kernels for compute capability 9.0 alone (H100, H200): run it there, or on"
    first, second, *_ = run(hopper, tmp_path / "log", text, STUB_CC="80")
    got = "CPU tensors; got a device of 8.0"
    assert first == ["RuntimeError", f"{cache}: qv {there} {got}"]
    assert second == ["RuntimeError", f"{dense}: V wider than 256 {there} {got}"]
    served, wide, *rest, backward = run(hopper, tmp_path / "log", text)
    assert served is wide is None
    no_fp8 = "on a GPU does not go with FP8 inputs; got k of torch.float8_e4m3fn"
    assert [words for _, words in rest] == [
        f"{dense}: V wider than 256 on a GPU does not go with dropout; got dropout_p 0.1",
        f"{cache}: qv {no_fp8}",
        f"{cache}: V wider than 256 {no_fp8}",
        f"{cache}: qv on a GPU goes with head dims of q and k up to 64; got 72",
    ]
    assert "no backward kernel for head dim 512" in backward[1]


def test_the_backend_has_latent_kernels_on_hopper_alone(hopper: Stub, tmp_path: Path) -> None:
    text = """
def problem(*dims, features=(), cc=(9, 0), dtype="float16"):
    return Problem("cuda", dtype, *dims, frozenset(features), cc)
asked = [problem(64, 512, features=["qv", "paged_kv"]), problem(64, 200, features=["qv", "causal"]),
         problem(40, 300, features=["kv_append", "varlen", "seqused", "rotary"]), problem(64, 256)]
elsewhere = problem(64, 512, features=["qv"], cc=(8, 0))
print(json.dumps([[[cuda.why_not(x), cuda.kernels(x)] for x in asked], cuda.why_not(elsewhere)]))
"""
    found, elsewhere = run(hopper, tmp_path / "log", text)
    kernels = [f"flash_fwd_sm90_latent_d{d}_fp16" for d in (512, 256, 512)]
    assert found[:3] == [[[], [kernel]] for kernel in kernels]
    assert "latent" not in found[3][1][0]
    assert len(elsewhere) == 1
    assert "on compute capability 9.0 alone" in elsewhere[0]


def test_packed_new_rows_are_counted_once(installed: Stub, tmp_path: Path) -> None:
    text = (
        CACHE
        + """
q, new, cache, cos = make(70, 4, 64), make(9, 2, 64), make(2, 40, 2, 64), make(50, 16)
cu_q, cu_new = torch.tensor([0, 3, 70]).int(), torch.tensor([0, 9, 9]).int()
out, lse = decode(q, cache, cache, new, new, cos, cu_q=cu_q, cu_new=cu_new)
print(json.dumps([list(out.shape), list(lse.shape)]))
"""
    )
    assert run(installed, tmp_path / "log", text) == [[70, 4, 64], [4, 70]]
    append, fill, _ = launches(tmp_path / "log")
    assert append.grid == -(-(9 * 2 + 70 * 4) // 4)
    assert fill.kernel == "flash_fill_bf16"


def test_a_cache_that_kernels_cannot_write_comes_back(installed: Stub, tmp_path: Path) -> None:
    text = (
        CACHE
        + """
q, new = make(2, 3, 4, 20), make(2, 5, 2, 20)
caches = [torch.rand(2, 40, 2, 20).bfloat16() for _ in range(2)]
before = [x.clone() for x in caches]
decode(q, *caches, new, new)
print(json.dumps([torch.equal(a, b) for a, b in zip(caches, before)]))
"""
    )
    # The stub's kernels write nothing: what was copied there is what comes back.
    assert run(installed, tmp_path / "log", text) == [True, True]
    (attention,) = launches(tmp_path / "log")
    assert ForwardHead.from_buffer_copy(attention.params).k.row == 2 * 24


def test_parts_are_merged_where_a_call_is_split(installed: Stub, tmp_path: Path) -> None:
    text = (
        CACHE
        + """
decode(make(2, 33, 4, 64), make(2, 400, 2, 64), make(2, 400, 2, 64), splits=3)
out, lse = cuda.combine(torch.zeros(5, 2, 7, 3, 20), torch.zeros(5, 2, 7, 3))
wrong = told(lambda: cuda.combine(torch.zeros(5, 2, 7, 3, 20), torch.zeros(5, 2, 3, 7)))
print(json.dumps([list(out.shape), list(lse.shape), str(out.dtype), wrong[1]]))
"""
    )
    *merged, wrong = run(installed, tmp_path / "log", text)
    assert merged == [[2, 7, 3, 20], [2, 7, 3], "torch.float32"]
    assert "got shapes (5, 2, 7, 3, 20) and (5, 2, 3, 7)" in wrong
    split, combine, parts = launches(tmp_path / "log")
    assert split.grid == 3 * 2 * 4
    assert (combine.kernel, combine.grid) == ("flash_combine_bf16", 2 * 4 * 33 // 4)
    assert parts.grid == 2 * 7 * 3  # of more than four parts, a CTA takes a row


def test_dropout_draws_from_torchs_generator_and_nothing_else_does(
    installed: Stub, tmp_path: Path
) -> None:
    text = """
q = make(1, 32, 2, 64)
def state(p):
    torch.manual_seed(3)
    drawn = forward(q, q, q, p=p)[3].tolist()
    return drawn, torch.randint(2**40, (1,)).item()
torch.manual_seed(3)
expected = torch.empty(2, dtype=torch.int64).random_().tolist()
torch.manual_seed(3)
untouched = torch.randint(2**40, (1,)).item()
print(json.dumps([state(0.1)[0] == expected, state(0.0)[1] == untouched]))
"""
    assert run(installed, tmp_path / "log", text) == [True, True]


PLAIN = """
from unittest import mock
from flash_attn import _attention
plain_op = torch.ops.flash_attn_cuda._flash_attn_forward.default
def plain(*arguments):
    return plain_op.redispatch(CUDA, *arguments)
q, k = make(2, 40, 4, 64), make(2, 50, 2, 64)
"""


def test_a_plain_call_gives_what_is_read_and_no_more(installed: Stub, tmp_path: Path) -> None:
    text = (
        PLAIN
        + """
tail = (0.5, True, 7, -1, 3.0, None, False)
cu = torch.tensor([0, 15, 40], dtype=torch.int32)
published, got = forward(q, k, k, 0.0, *tail[:-1]), plain(q, k, k, 0.0, *tail)
varlen = torch.ops.flash_attn_cuda._flash_attn_varlen_forward.default.redispatch(
    CUDA, q[0], k[0], k[0], cu, cu, 25, 25, 0.0, *tail, None, None, None, False)
print(json.dumps([[[list(x.shape), str(x.dtype)] for x in results]
                  for results in (published, got, varlen)]
                 + [told(lambda: plain(q, k, k, 0.5, *tail))]))
"""
    )
    published, got, varlen, refused = run(installed, tmp_path / "log", text)
    assert (
        got == published[:2] == [[[2, 40, 4, 64], "torch.bfloat16"], [[2, 4, 40], "torch.float32"]]
    )
    assert varlen == [[[40, 4, 64], "torch.bfloat16"], [[4, 40], "torch.float32"]]
    assert refused == [
        "ValueError",
        "flash_attn::_flash_attn_forward: dropout_p must be 0; got 0.5",
    ]
    first, second, *_ = launches(tmp_path / "log")
    # Of the same parameters but for the addresses of out and lse.
    assert (first.kernel, first.grid, first.smem) == (second.kernel, second.grid, second.smem)
    pointers = {at + i for at in (ForwardHead.o.offset, ForwardHead.lse.offset) for i in range(8)}
    pairs = enumerate(zip(first.params, second.params))
    assert {i for i, (x, y) in pairs if x != y} <= pointers


def test_results_share_no_storage(installed: Stub, tmp_path: Path) -> None:
    text = (
        PLAIN
        + """
results = [forward(q, k, k), forward(q, k, k, p=0.1, s_dmask=True),
           torch.ops.flash_attn_cuda.forward(q, k, k, *[None] * 8, False, *[None] * 9, 0.5, -1, -1,
                                             0, 0.0, None, 0.0, None, False, 1)]
print(json.dumps([[x.untyped_storage()._cdata for x in made] for made in results]))
"""
    )
    for storages in run(installed, tmp_path / "log", text):
        assert len({*storages}) == len(storages)


def test_eager_calls_without_dropout_are_plain_ones(installed: Stub, tmp_path: Path) -> None:
    text = (
        PLAIN
        + """
seen = []
def noting(name, op):
    return lambda *arguments: seen.append(name) or op(*arguments)
published = lambda *arguments: direct("_flash_attn_forward", *arguments)
_attention._DENSE = _attention._DENSE._replace(
    forward=noting("published", published), plain_forward=noting("plain", plain))
class Kind(torch.Tensor):
    pass
x = q.clone().requires_grad_()
with mock.patch.object(torch.Tensor, "is_cuda", True, create=True):
    f = flash_attn.flash_attn_func
    f(q, k, k)
    out = f(x, k, k)
    f(q, k, k, dropout_p=0.1)
    f(q, k, k, return_attn_probs=True)
    f(q.as_subclass(Kind), k, k)
    wrong = told(lambda: f(q, k, k, softcap=-1.0))[1]
gradient, = torch.autograd.grad(out.sum(), x)
print(json.dumps([cuda.IS_DIRECT, seen, wrong, list(gradient.shape)]))
"""
    )
    is_direct, seen, wrong, shape = run(installed, tmp_path / "log", text)
    assert is_direct
    assert seen == ["plain"] * 2 + ["published"] * 3 + ["plain"]
    assert wrong.startswith("flash_attn_func: softcap must be 0 (off) or positive; got -1.0")
    assert shape == [2, 40, 4, 64]


BAD_CALLS = {
    "heads": "q[:, :, :3], q[:, :, :2], q[:, :, :2]",
    "head dims": "q, q[..., :32], q",
    "rank": "q[0], q, q",
    "batch": "q, q[:1], q[:1]",
    "dtype of k": "q, q.half(), q",
    "too wide": "*[make(2, 8, 4, 264)] * 3",
    "softcap": "q, q, q, 0.0, 0.5, False, -1, -1, -2.0",
    "infinite softcap": "q, q, q, 0.0, 0.5, False, -1, -1, float('inf')",
    "softcap with dropout": "q, q, q, 0.5, 0.5, False, -1, -1, 2.0",
    "scale": "q, q, q, 0.0, float('nan')",
    "dropout": "q, q, q, 1.5",
    "slopes": "q, q, q, 0.0, 0.5, False, -1, -1, 0.0, torch.ones(3)",
    "dtype of slopes": "q, q, q, 0.0, 0.5, False, -1, -1, 0.0, make(4)",
    "s_dmask": "q, q, q, 0.0, 0.5, False, -1, -1, 0.0, None, True",
}


def test_every_rule_is_told_as_python_tells_it(installed: Stub, tmp_path: Path) -> None:
    text = f"""
q = make(2, 8, 4, 64)
def python(q, k, v, p=0.0, scale=0.5, causal=False, left=-1, right=-1, softcap=0.0, slopes=None,
           s_dmask=False):
    return ops._flash_attn_forward(q, k, v, p, scale, causal, left, right, softcap, slopes, s_dmask)
calls = {{name: eval(f"lambda f: f({{words}})") for name, words in {BAD_CALLS!r}.items()}}
print(json.dumps({{name: [told(lambda: call(f)) for f in (forward, python)]
                   for name, call in calls.items()}}))
"""
    for name, (here, python) in run(installed, tmp_path / "log", text).items():
        assert here is not None, name
        assert here == python, name


def test_thousands_of_errors_leave_the_process_alive(installed: Stub, tmp_path: Path) -> None:
    text = """
import threading
q = make(2, 8, 4, 64)
def many():
    for _ in range(1000):
        assert told(lambda: forward(q, q, q, softcap=-1.0))[0] == "ValueError"
threads = [threading.Thread(target=many) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(json.dumps(told(lambda: forward(q, q, q, softcap=-1.0))))
"""
    kind, words = run(installed, tmp_path / "log", text)
    assert kind == "ValueError"
    assert "softcap must be 0 (off) or positive; got -1.0" in words


def test_what_the_driver_says_reaches_python(installed: Stub, tmp_path: Path) -> None:
    text = "q = make(2, 8, 4, 64)\nprint(json.dumps(told(lambda: forward(q, q, q))))"
    kind, words = run(installed, tmp_path / "log", text, STUB_NO_DEVICE="1")
    assert kind == "RuntimeError"
    assert words.startswith("flash_attn::_flash_attn_forward: cuInit: ")
    assert "no CUDA-capable device is detected" in words


def test_the_way_through_python_gives_the_same_launch(installed: Stub, tmp_path: Path) -> None:
    text = """
q = make(2, 40, 4, 64)
forward(q, q, q, softcap=3.0)
out, lse, s_dmask = cuda.forward(Forward(q, q, q, Scores(0.5, softcap=3.0), num_splits=1), "f")
name = told(lambda: cuda.forward(Forward(q, q, q, Scores(0.5, softcap=-3.0)), "f"))[1]
print(json.dumps([list(out.shape), name.split(":")[0]]))
"""
    assert run(installed, tmp_path / "log", text) == [[2, 40, 4, 64], "f"]
    first, second = launches(tmp_path / "log")
    assert (first.kernel, first.grid) == (second.kernel, second.grid)


def test_the_shim_needs_no_cuda_and_hides_its_runtime(installed: Stub) -> None:
    library = installed.folder / "flash_attn" / native.shim_name(native.find_torch())
    command = [needs("readelf"), "--wide", "-d", "--dyn-syms", str(library)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", told))
    torch_libraries = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
    system = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    if not native.find_torch().is_stable:
        system.add("libstdc++.so.6")
    assert needed <= torch_libraries | system | {native.HOST_LIBRARY}
    # Two unwinders in one process end it at the first exception.
    assert "libgcc_s.so.1" in needed
    assert ("GLIBCXX" in told) == (not native.find_torch().is_stable)


def test_a_portable_shim_asks_nothing_new_of_a_system(tmp_path: Path) -> None:
    here = native.find_torch()
    host = native.host(tmp_path / native.HOST_LIBRARY, needs("g++"))
    # Behind a link, because g++ names the file at its end.
    (tmp_path / "include").symlink_to(here.include)
    linked = replace(here, include=tmp_path / "include")
    library = native.shim(tmp_path / "shim.so", host, linked, needs("g++"), is_portable=True)
    for file in (host, library):
        assert elf.read(file).newer_than(MANYLINUX_2_28) == []
    strings = library.read_bytes()
    for path in (here.include, linked.include, ROOT):
        assert str(path).encode() not in strings
