"""Compilers and exporters see well-behaved operators."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_calls import COMPILES, CU, HK, HQ, B, D, Row, S, dense, equal, normal, packed
from torch import Tensor

import flash_attn
import flash_attn_interface as fa3
from flash_attn import flash_attn_interface as fa2

pytestmark = COMPILES

# --- Every public function, compiled ------------------------------------------------------------

OPTIONS: dict[str, Any] = {"causal": True, "window_size": (5, 0), "softcap": 8.0}
OPTIONS_2 = {**OPTIONS, "alibi_slopes": torch.linspace(0.1, 0.4, HQ)}

FUNCTIONS: list[Row] = [
    ("func", lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **OPTIONS_2), dense()),
    (
        "kvpacked",
        lambda q, kv: flash_attn.flash_attn_kvpacked_func(q, kv, **OPTIONS_2),
        (normal(B, S, HQ, D), normal(B, S, 2, HK, D)),
    ),
    (
        "qkvpacked",
        lambda qkv: flash_attn.flash_attn_qkvpacked_func(qkv, **OPTIONS_2),
        (normal(B, S, 3, HQ, D),),
    ),
    (
        "varlen",
        lambda q, k, v: flash_attn.flash_attn_varlen_func(
            q, k, v, CU, CU.clone(), 5, 5, **OPTIONS_2
        ),
        packed(),
    ),
    (
        "varlen_kvpacked",
        lambda q, kv: flash_attn.flash_attn_varlen_kvpacked_func(
            q, kv, CU, CU.clone(), 5, 5, **OPTIONS_2
        ),
        (normal(S, HQ, D), normal(S, 2, HK, D)),
    ),
    (
        "varlen_qkvpacked",
        lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU, 5, **OPTIONS_2),
        (normal(S, 3, HQ, D),),
    ),
    (
        "triple",
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)[:2],
        dense(),
    ),
    ("class", lambda q, k, v: fa2.FlashAttnFunc.apply(
        q, k, v, 0.0, None, True, (-1, -1), 0.0, None, False, False, torch.is_grad_enabled()
    ), dense()),
    ("fa3_func", lambda q, k, v: fa3.flash_attn_func(q, k, v, **OPTIONS), dense()),
    (
        "fa3_varlen",
        lambda q, k, v: fa3.flash_attn_varlen_func(q, k, v, CU, CU.clone(), 5, 5, **OPTIONS),
        packed(),
    ),
    (
        "fa3_qkvpacked",
        lambda qkv: fa3.flash_attn_qkvpacked_func(qkv, **OPTIONS),
        (normal(B, S, 3, HQ, D),),
    ),
    (
        "fa3_qkvpacked_heads",
        lambda qkv: fa3.flash_attn_qkvpacked_func(qkv, num_heads_q=HQ, **OPTIONS),
        (normal(B, S, HQ + 2 * HK, D),),
    ),
]  # fmt: skip
IDS = [row[0] for row in FUNCTIONS]


def outputs_and_gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    results = result if isinstance(result, tuple) else (result,)
    weights = torch.linspace(-1.0, 1.0, results[0].numel()).view_as(results[0])
    return [*results, *torch.autograd.grad(results[0], leaves, weights)]


@pytest.mark.parametrize(("name", "function", "inputs"), FUNCTIONS, ids=IDS)
def test_compiled_call_and_gradients_equal_eager(
    name: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert equal(outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs))


@pytest.mark.parametrize(("name", "function", "inputs"), FUNCTIONS, ids=IDS)
def test_compiled_inference_equals_eager(
    name: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, expected = compiled(*inputs), function(*inputs)
    if isinstance(got, Tensor):
        got, expected = (got,), (expected,)
    assert equal([*got], [*expected])


SAME_TENSOR_TWICE: list[Row] = [
    ("cu_seqlens", lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5),
     packed()),
    ("qkv", lambda x: flash_attn.flash_attn_func(x, x, x), (normal(B, S, HQ, D),)),
    ("k_is_v", lambda q, x: flash_attn.flash_attn_func(q, x, x), dense()[:2]),
    ("fa3_cu_seqlens", lambda q, k, v: fa3.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5), packed()),
    ("fa3_qkv", lambda x: fa3.flash_attn_func(x, x, x), (normal(B, S, HQ, D),)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "function", "inputs"), SAME_TENSOR_TWICE, ids=[row[0] for row in SAME_TENSOR_TWICE]
)
def test_compiled_call_may_get_one_tensor_twice(
    name: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> None:
    # Self-attention over packed sequences passes its cu_seqlens for queries and for keys.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = (outputs_and_gradients(f, inputs) for f in (compiled, function))
    # Not bitwise: gradients of one tensor are added up in another order.
    torch.testing.assert_close(got, expected)


def test_compiled_max_seqlen_may_be_read_from_a_tensor() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        longest = cu.diff().max().item()
        return flash_attn.flash_attn_varlen_func(q, k, v, cu, cu.clone(), longest, longest)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    # transformers says so to its users: without it a graph may not read numbers from tensors.
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert torch.equal(compiled(*packed(), CU), function(*packed(), CU))


@pytest.mark.skipif(
    not hasattr(torch.library, "infer_schema"), reason="torch 2.4 cannot guard a power of a size"
)
def test_dynamic_shapes_need_one_compilation() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_func(q, k, v, causal=True) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for s in (7, 12, 130):
        x = normal(B, s, HQ, D), normal(B, s + 3, HK, D), normal(B, s + 3, HK, D)
        got, expected = outputs_and_gradients(compiled, x), outputs_and_gradients(function, x)
        assert equal(got, expected)
    assert len(graphs) == 1


@pytest.mark.skipif(
    not hasattr(torch.library, "infer_schema"),
    reason="torch 2.4's inductor mixes up the buffers that an operator writes",
)
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")),
    reason="inductor needs a C++ compiler",
)
def test_inductor_runs_forward_and_backward() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_func(q * 2, k, v.sin(), causal=True) + 1

    compiled = torch.compile(function, fullgraph=True)
    got, expected = (outputs_and_gradients(f, dense()) for f in (compiled, function))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)  # inductor's own sine rounds otherwise


def test_compiled_dropout_draws_anew_in_each_call() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # The keys of the second call differ in name only: torch joins calls that are equal in
        # every argument, random or not, its own attention included.
        first = flash_attn.flash_attn_func(q, k, v, 0.4)
        return first, flash_attn.flash_attn_func(q, k * 1.0, v, 0.4)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in dense()]
    torch.manual_seed(3)
    drawn = [*compiled(*inputs), *compiled(*inputs)]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(drawn[i], drawn[j])
    torch.manual_seed(3)
    assert equal([*compiled(*inputs)], drawn[:2])


def test_compiled_dropout_has_the_gradients_of_its_own_mask() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_func(q, k, v, 0.4)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, function):
        torch.manual_seed(3)
        results.append(outputs_and_gradients(f, dense()))
    assert equal(*results)


# --- The cache ----------------------------------------------------------------------------------


def cache_call(is_fa3: bool, q: Tensor, k: Tensor, v: Tensor, *caches: Tensor) -> Any:
    *caches, lengths = caches
    function = fa3.flash_attn_with_kvcache if is_fa3 else flash_attn.flash_attn_with_kvcache
    return function(q, *caches, k, v, cache_seqlens=lengths, causal=True, return_softmax_lse=True)


@pytest.mark.parametrize("is_fa3", [False, True], ids=["fa2", "fa3"])
def test_compiled_append_writes_the_cache(is_fa3: bool) -> None:
    q, k, v = normal(B, 2, HQ, D), normal(B, 2, HK, D), normal(B, 2, HK, D) + 1
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    function = partial(cache_call, is_fa3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    runs = []
    for f in (compiled, function):
        caches = [normal(B, 12, HK, D), normal(B, 12, HK, D) * 2]
        with torch.no_grad():
            runs.append([*f(q, k, v, *caches, lengths), *caches])
    assert equal(*runs)
    assert torch.equal(runs[0][-1][0, 3:5], v[0])


def test_compiled_int_length_may_change() -> None:
    q, k, v = normal(B, 1, HQ, D), normal(B, 1, HK, D), normal(B, 1, HK, D) + 1

    def function(length: int, *caches: Tensor) -> Tensor:
        return flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=length)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (2, 3, 4):
        caches = [normal(B, 12, HK, D), normal(B, 12, HK, D) * 2]
        with torch.no_grad():
            expected = function(length, *(x.clone() for x in caches))
            assert torch.equal(compiled(length, *caches), expected)
        assert torch.equal(caches[1][:, length], v[:, 0])


def test_combine_and_metadata_compile() -> None:
    out, lse = normal(3, B, S, HQ, D), normal(3, B, S, HQ)
    compiled = torch.compile(fa3.flash_attn_combine, fullgraph=True, backend="aot_eager")
    assert equal([*compiled(out, lse)], [*fa3.flash_attn_combine(out, lse)])
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    plan = partial(fa3.get_scheduler_metadata, B, 1, 12, HQ, HK, D)
    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(lengths), plan(lengths))


def test_cache_call_has_no_gradient_and_says_so() -> None:
    q = normal(B, 2, HQ, D).requires_grad_()
    caches = [normal(B, 12, HK, D), normal(B, 12, HK, D) * 2]
    out = flash_attn.flash_attn_with_kvcache(q, *caches)
    with pytest.raises(RuntimeError):
        out.sum().backward()


# --- Export, shapes -----------------------------------------------------------------------------


class Call(torch.nn.Module):
    """A row's function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


EXPORTS: list[Row] = [
    ("func", lambda q, k, v: flash_attn.flash_attn_func(q, k, v, **OPTIONS), dense()),
    ("varlen_qkvpacked", lambda qkv, cu: flash_attn.flash_attn_varlen_qkvpacked_func(
        qkv, cu, 5, **OPTIONS),
     (normal(S, 3, HQ, D), CU)),
    ("fa3_func", lambda q, k, v: fa3.flash_attn_func(q, k, v, **OPTIONS), dense()),
]  # fmt: skip


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.parametrize(("name", "function", "inputs"), EXPORTS, ids=[row[0] for row in EXPORTS])
def test_exported_program_holds_the_operator_and_equals_eager(
    name: str, function: Callable[..., Any], inputs: tuple[Tensor, ...], strict: bool
) -> None:
    program = torch.export.export(Call(function), inputs, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("flash_attn") for target in targets), targets
    assert torch.equal(program.module()(*inputs), function(*inputs))


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_exported_shapes_may_be_dynamic(strict: bool) -> None:
    s = torch.export.Dim("s", min=2, max=512)
    call = Call(lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True))
    inputs = normal(B, 8, HQ, D), normal(B, 8, HK, D), normal(B, 8, HK, D)
    shapes = {"inputs": ({1: s},) * 3}
    program = torch.export.export(call, inputs, dynamic_shapes=shapes, strict=strict)
    others = normal(B, 200, HQ, D), normal(B, 200, HK, D), normal(B, 200, HK, D)
    assert torch.equal(program.module()(*others), call(*others))


def test_exported_layer_with_parameters() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(D, 3 * D)

        def forward(self, x: Tensor) -> Tensor:
            qkv = self.qkv(x).unflatten(-1, (3, 1, D))
            return flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)

    layer, x = Layer(), normal(B, S, D)
    for strict in (False, True):
        program = torch.export.export(layer, (x,), strict=strict)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("module", [flash_attn, fa3], ids=["fa2", "fa3"])
def test_meta_tensors_give_the_shapes(module: Any) -> None:
    inputs = dense()
    for requires_grad in (False, True):
        metas = [x.to("meta").requires_grad_(requires_grad) for x in inputs]
        got = module.flash_attn_func(*metas, return_attn_probs=True)
        expected = module.flash_attn_func(*inputs, return_attn_probs=True)
        for a, b in zip(got, expected):
            assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")
    got[0].sum().backward()
    assert [x.grad.shape for x in metas] == [x.shape for x in inputs]
