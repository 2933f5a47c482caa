"""FlashAttention-3's operators and torch's own attention in the shim, without a GPU (shim_runs.py).

Each also has a way through Python: both must launch the same and refuse the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from native_tools import ForwardHead, Stub, launches
from shim_runs import run

FA3 = """
from flash_attn import _ops_fa3, backends, _sdpa
import flash_attn_interface as fa3
def op(name):
    return getattr(torch.ops.flash_attn_3, name).default
def served(name):
    return lambda *args, **options: op(name).redispatch(CUDA, *args, **options)
IN_PYTHON = {"fwd": _ops_fa3._fwd, "_flash_attn_forward": _ops_fa3._forward,
             "_flash_attn_backward": _ops_fa3._backward}
def in_python(name):
    def call(*args, **options):
        return IN_PYTHON[name](*args, **options)
    return call
def through_python(run):
    backends._backend_for = lambda problem, name: cuda
    return run()
q, k = make(2, 40, 4, 64), make(2, 50, 2, 64)
cu = torch.tensor([0, 15, 40]).int()
lens, new = torch.tensor([3, 40]).int(), make(2, 2, 2, 64)
cos = make(60, 16)
pages, table = make(9, 16, 2, 64), torch.arange(8).view(2, 4).int()
x, lse = q.clone(), torch.zeros(2, 4, 40)
"""
# Forward calls: arguments of the operator by name.
CALLS = {
    "dense": "q, k, k, is_causal=True",
    "scaled": "q, k, k, softmax_scale=0.25, softcap=3.0, window_size_left=7, num_splits=1",
    "packed": "q[0], k[0], k[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=25, "
    "max_seqlen_k=25, seqused_q=lens, seqused_k=lens",
    "margin": "q, k, k, sm_margin=3",
    "pages": "q, pages, pages, page_table=table, seqused_k=lens, leftpad_k=lens, num_splits=1",
    "rows of a cache": "q[:, :2], k, k, seqused_k=lens, kv_batch_idx=lens % 2, num_splits=1",
    "chunk": "q, k, k, attention_chunk=16",
}
# Of the published operator alone: they write.
WRITING_CALLS = {
    "append": "q, k, k.clone(), new, new, seqused_k=lens, num_splits=1",
    "rotary": "q, k, k.clone(), new, new, seqused_k=lens, rotary_cos=cos, rotary_sin=cos, "
    "seqlens_rotary=lens, is_rotary_interleaved=True, num_splits=1",
    "packed new rows": "q, k, k.clone(), new[0], new[0], seqused_k=lens, "
    "cu_seqlens_k_new=torch.tensor([0, 1, 2]).int(), num_splits=1",
}


def assert_same(stub: Stub, log: Path, name: str, calls: dict[str, str]) -> None:
    """Both ways launch the same kernels on the same grids and have the same results."""
    text = f"""{FA3}
LOG, calls = {str(log)!r}, {calls!r}
def told_of(results):
    results = results if isinstance(results, tuple) else (results,)
    return [[list(x.shape), str(x.dtype)] for x in results], len({{x.untyped_storage()._cdata
                                                                   for x in results}})
def both(words):
    call = eval(f"lambda f: f({{words}})")
    here = told_of(call(served("{name}")))
    middle = launched()
    return [here, told_of(through_python(lambda: call(in_python("{name}")))), middle, launched()]
def launched():
    return sum(line.startswith("launch") for line in open(LOG))
print(json.dumps({{label: both(words) for label, words in calls.items()}}))
"""
    found = run(stub, log, text)
    made = [(x.kernel, x.grid, x.smem) for x in launches(log)]
    first = 0
    for label, (here, there, middle, last) in found.items():
        assert here == there, label
        assert len(here[0]) == here[1], f"{label}: results share storage"
        assert made[first:middle] == made[middle:last] != [], label
        first = last
    assert list(found) == list(calls)


def test_the_traced_forward_operator_launches_what_python_does(
    installed: Stub, tmp_path: Path
) -> None:
    calls = {label: words.replace("is_causal", "causal") for label, words in CALLS.items()}
    assert_same(installed, tmp_path / "log", "_flash_attn_forward", calls)


def test_the_published_forward_operator_launches_what_python_does(
    installed: Stub, tmp_path: Path
) -> None:
    assert_same(installed, tmp_path / "log", "fwd", {**CALLS, **WRITING_CALLS})


def test_the_result_is_written_where_it_is_asked_for(installed: Stub, tmp_path: Path) -> None:
    text = f"""{FA3}
given = torch.zeros_like(q)
out, *_ = served("fwd")(q, k, k, out=given)
print(json.dumps([out is given or out.data_ptr() == given.data_ptr(), given.data_ptr()]))
"""
    is_same, pointer = run(installed, tmp_path / "log", text)
    assert is_same
    (launch,) = launches(tmp_path / "log")
    assert ForwardHead.from_buffer_copy(launch.params).o.ptr == pointer


BACKWARD_CALLS = {
    "dense": "x, q, k, k, x, lse, is_causal=True",
    "given": "x, q, k, k, x, lse, dq=q.clone(), dk=k.clone(), dv=k.clone(), deterministic=True, "
    "sm_margin=2, softmax_scale=0.25, window_size_left=9, softcap=2.0",
    "packed": "x[0], q[0], k[0], k[0], x[0], lse[0], cu, cu, lens, lens, 25, 25",
}


def test_the_backward_operator_launches_what_python_does(installed: Stub, tmp_path: Path) -> None:
    assert_same(installed, tmp_path / "log", "_flash_attn_backward", BACKWARD_CALLS)


BAD_CALLS = {
    "heads": "q[:, :, :3], k, k",
    "margin": "q, k, k, sm_margin=-1",
    "chunk": "q, k, k, attention_chunk=-1",
    "qv": "q, k, k, {qv}=make(2, 40, 4, 32)",
    "descale": "q, k, k, q_descale=torch.ones(2, 2)",
    "lens": "q, k, k, seqused_k=lens.long()",
    "metadata": "q, k, k, scheduler_metadata=lens.long()",
    "scale": "q, k, k, softmax_scale=float('nan')",
}
BAD_WRITES = {
    "key alone": "q, k, k, new, seqused_k=lens",
    "value alone": "q, k, k, v_new=new, seqused_k=lens",
    "rotary alone": "q, k, k, rotary_cos=cos, rotary_sin=cos",
    "boundaries alone": "q, k, k, cu_seqlens_k_new=cu",
    "positions alone": "q, k, k, seqlens_rotary=lens",
    "no lengths": "q, k, k, new, new",
    "packed keys": "q, k[0], k[0], new, new, cu_seqlens_k=cu, seqused_k=lens",
    "out_dtype": "q, k, k, out=q.half()",
    "out_shape": "q, k, k, out=q[..., :32]",
}


@pytest.mark.parametrize("name", ["_flash_attn_forward", "fwd"])
def test_every_rule_is_told_as_python_tells_it(name: str, installed: Stub, tmp_path: Path) -> None:
    is_published = name == "fwd"
    qv = "q_v" if is_published else "qv"
    calls = {label: words.format(qv=qv) for label, words in {**BAD_CALLS, **BAD_WRITES}.items()}
    if not is_published:
        calls = {label: words.replace("out=", "out_=") for label, words in calls.items()}
    text = f"""{FA3}
calls = {{name: eval(f"lambda f: f({{words}})") for name, words in {calls!r}.items()}}
print(json.dumps({{name: [told(lambda: call(f("{name}"))) for f in (served, in_python)]
                   for name, call in calls.items()}}))
"""
    for label, (here, python) in run(installed, tmp_path / "log", text).items():
        assert here is not None, label
        words = python[1].replace("int32 on cpu", "int32 on cuda:-1")
        words = words.replace("int64 on cpu", "int64 on cuda:-1")
        assert here == [python[0], words], label


def test_errors_of_the_backward_operator_are_those_of_python(
    installed: Stub, tmp_path: Path
) -> None:
    text = f"""{FA3}
def calls(f):
    return [told(lambda: f(x, q, k, k, x, lse, sm_margin=-1)),
            told(lambda: f(x, q, k, k, x, lse, softcap=-1.0)),
            told(lambda: f(x, q, k, k, x, lse[:1]))]
print(json.dumps([calls(f("_flash_attn_backward")) for f in (served, in_python)]))
"""
    here, python = run(installed, tmp_path / "log", text)
    assert None not in here
    assert here == python


def test_functions_name_themselves_in_errors(installed: Stub, tmp_path: Path) -> None:
    """What the shim says of its operators is told of the function that was called."""
    text = f"""{FA3}
from unittest import mock
from flash_attn import _attention_fa3
class Ops:
    class _flash_attn_forward:
        default = staticmethod(served("_flash_attn_forward"))
_attention_fa3._OPS = Ops
print(json.dumps([told(lambda: fa3.flash_attn_func(q, k, k, softcap=-1.0))[1],
                  told(lambda: fa3.flash_attn_func(q.requires_grad_(), k, k, softcap=-1.0))[1]]))
"""
    words = "flash_attn_func: softcap must be 0 (off) or positive; got -1.0"
    assert run(installed, tmp_path / "log", text) == [words, words]


SDPA = """
from flash_attn import _sdpa
assert _sdpa._has_dense_schema()
dense = torch.ops.aten._scaled_dot_product_flash_attention.default
def sdpa(*arguments, **options):
    return dense.redispatch(CUDA, *arguments, **options)
def has_kernel():
    return torch._C._dispatch_has_kernel_for_dispatch_key(dense.name(), "CUDA")
"""


@pytest.mark.parametrize("order", ["b, s, h", "b, h, s", "s, b, h"])
def test_torchs_own_attention_reaches_the_driver_without_copies(
    order: str, installed: Stub, tmp_path: Path
) -> None:
    axes = order.split(", ")
    sizes = {"b": 2, "h": 4, "s": 40}
    text = f"""{SDPA}
stored = [make(*{[sizes[x] for x in axes]}, 64).permute(*{[axes.index(x) for x in "bhs"]}, 3)
          for _ in range(3)]
cuda.serve_sdpa(True)
out, lse, starts_q, starts_k, sq, sk, state, unused, s_dmask = sdpa(*stored, 0.0, True, scale=0.25)
like = torch.empty_like(stored[0])
print(json.dumps([[x.data_ptr() for x in (*stored, out, lse)], out.stride() == like.stride(),
                  [starts_q, starts_k, sq, sk], [list(x.shape) for x in (out, lse, s_dmask)],
                  [str(state.dtype), state.numel(), str(unused.dtype), unused.dim()]]))
"""
    pointers, is_like, rest, shapes, states = run(installed, tmp_path / "log", text)
    (launch,) = launches(tmp_path / "log")
    head = ForwardHead.from_buffer_copy(launch.params)
    assert [x.ptr for x in (head.q, head.k, head.v, head.o)] + [head.lse] == pointers
    assert is_like
    assert rest == [None, None, 40, 40]
    assert shapes == [[2, 4, 40, 64], [2, 4, 40], [0]]
    assert states == ["torch.uint64", 2, "torch.uint64", 0]


def test_the_state_of_dropout_is_the_drawn_one(installed: Stub, tmp_path: Path) -> None:
    text = f"""{SDPA}
cuda.serve_sdpa(True)
q = make(1, 2, 40, 64)
torch.manual_seed(3)
expected = torch.empty(2, dtype=torch.int64).random_()
torch.manual_seed(3)
results = sdpa(q, q, q, 0.5, False, True)
print(json.dumps([torch.equal(results[6].view(torch.int64), expected), list(results[8].shape)]))
"""
    assert run(installed, tmp_path / "log", text) == [True, [1, 2, 128, 128]]


def test_it_is_served_until_it_is_taken_back(installed: Stub, tmp_path: Path) -> None:
    text = f"""{SDPA}
seen = [has_kernel()]
for is_on in (True, True, False, False, True):
    cuda.serve_sdpa(is_on)
    seen.append(has_kernel())
q = make(1, 2, 40, 64)
seen.append(told(lambda: sdpa(q[0], q, q)))
seen.append(told(lambda: sdpa(q, q, q, scale=float("nan"))))
print(json.dumps(seen))
"""
    *seen, rank, scale = run(installed, tmp_path / "log", text)
    assert seen == [False, True, True, False, False, True]
    assert rank[1] == (
        "_scaled_dot_product_flash_attention: query must have shape (batch_size, num_heads, "
        "seqlen, head_size); got shape (2, 40, 64)"
    )
    assert scale[1].startswith("_scaled_dot_product_flash_attention: softmax_scale must be finite")


def test_a_schema_that_the_shim_does_not_know_stays_in_python(
    installed: Stub, tmp_path: Path
) -> None:
    text = f"""{SDPA}
asked = []
cuda.serve_sdpa = asked.append
def activate():
    _sdpa.Activated().remove()
    return list(asked)
known = activate()
_sdpa._DENSE_SCHEMA = _sdpa._DENSE_SCHEMA.replace("SymInt max_k", "SymInt max_k, Tensor more")
print(json.dumps([known, activate()]))
"""
    known, unknown = run(installed, tmp_path / "log", text)
    assert known == [True, False]
    assert unknown == [True, False, False]


# Where CPU tensors stand for those of a GPU, their device must too.
OTHER_GPU = """
from flash_attn import _attention, _attention_fa3, _kvcache
import flash_attn_interface as fa3
NAMES = ["flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_backward",
         "flash_attn::_flash_attn_with_kvcache", "flash_attn_3::fwd",
         "flash_attn_3::_flash_attn_forward", "flash_attn_cuda::_flash_attn_forward",
         "aten::_scaled_dot_product_flash_attention"]
cuda.serve_sdpa(True)
def served_here():
    return [torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in NAMES]
torch.cuda.get_device_capability = lambda device: (CC // 10, CC % 10)
real = cuda.gives_way
cuda.gives_way = lambda device: real(torch.device("cuda", 0))
class OnShim:
    # An overload that runs what serves CUDA tensors, as long as something does.
    def __init__(self, op):
        self.op = op
    def __call__(self, *arguments):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(self.op.name(), "CUDA")
        return self.op.redispatch(CUDA, *arguments) if has else self.op(*arguments)
    default = property(lambda self: self)
_attention._DENSE = _attention._DENSE._replace(
    forward=OnShim(ops._flash_attn_forward.default))
fa3_forward = OnShim(torch.ops.flash_attn_3._flash_attn_forward.default)
_attention_fa3._OPS = type("Ops", (), {"_flash_attn_forward": fa3_forward})
class Torch:
    ops = type("Ops", (), {"flash_attn": type("Ops", (), {
        "_flash_attn_with_kvcache": OnShim(ops._flash_attn_with_kvcache.default)})})
    def __getattr__(self, name):
        return getattr(torch, name)
_kvcache.torch = Torch()
q = torch.randn(1, 5, 2, 64)
calls = {"fa2": lambda: flash_attn.flash_attn_func(q, q, q, causal=True),
         "fa3": lambda: fa3.flash_attn_func(q, q, q, causal=True),
         "cache": lambda: flash_attn.flash_attn_with_kvcache(q, q, q, causal=True)}
expected = torch.nn.functional.scaled_dot_product_attention(
    *[q.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
"""


@pytest.mark.parametrize("name", ["fa2", "fa3", "cache"])
def test_a_device_without_kernels_goes_to_other_backends(
    name: str, installed: Stub, tmp_path: Path
) -> None:
    text = f"""
CC = 75
{OTHER_GPU}
before = served_here(), cuda.IS_DIRECT
q = q.to(torch.bfloat16)  # the shim's dtypes
out = calls["{name}"]()
print(json.dumps([before, served_here(), cuda.IS_DIRECT,
                  bool((out.float() - expected).abs().max() < 0.05)]))
"""
    before, after, is_direct, is_right = run(installed, tmp_path / "log", text, STUB_CC="75")
    assert before == [[True] * 7, True]
    assert after == [False] * 7
    assert not is_direct
    assert is_right


def test_an_error_on_a_device_with_kernels_is_an_error(installed: Stub, tmp_path: Path) -> None:
    text = f"""
CC = 90
{OTHER_GPU}
q = q.to(torch.bfloat16)
wrong = told(lambda: flash_attn.flash_attn_func(q, q, q, softcap=-1.0))
print(json.dumps([wrong, served_here(), cuda.IS_DIRECT]))
"""
    wrong, served, is_direct = run(installed, tmp_path / "log", text)
    assert wrong[1].startswith("flash_attn_func: softcap must be 0 (off) or positive")
    assert served == [True] * 7
    assert is_direct
