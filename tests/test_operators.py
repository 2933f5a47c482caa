"""Checkers, counters, checkpointing and transforms see well-behaved operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as checkpointing
from small_calls import COMPILES, CU, HK, HQ, OPS, OPS_3, B, D, Row, S, dense, equal, normal, packed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flash_attn
import flash_attn_interface as fa3
from flash_attn import _attention, _ops

pytestmark = COMPILES

# --- Operators ----------------------------------------------------------------------------------

_SCORES = (0.25, True, 5, 0, 0.0)


def operator_rows() -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    q, k, v = dense()
    slopes = torch.linspace(0.1, 0.4, HQ)
    rng_state = torch.tensor([5, 7])
    out, lse, _, _ = OPS._flash_attn_forward(q, k, v, 0.0, *_SCORES, slopes, False)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    pq, pk, pv = packed()
    lengths = (CU, CU.clone(), 5, 5)
    pout, plse, _, _ = OPS._flash_attn_varlen_forward(pq, pk, pv, *lengths, 0.0, *_SCORES)
    pgrads = [torch.empty_like(x) for x in (pq, pk, pv)]
    caches = (normal(B, 12, HK, D), normal(B, 12, HK, D) * 2)
    new = (normal(B, 2, HK, D), normal(B, 2, HK, D))
    used = torch.tensor([3, 0], dtype=torch.int32)
    cache_tail = (0.25, True, -1, -1, 0, 0.0, True, None, 0)
    pages = (normal(5, 4, HK, D), normal(5, 4, HK, D))
    table = torch.tensor([[4, 0], [1, 2]], dtype=torch.int32)
    return [
        ("forward", OPS._flash_attn_forward, (q, k, v, 0.0, *_SCORES, slopes, False), {}),
        ("forward-dropout", OPS._flash_attn_forward, (q, k, v, 0.2, *_SCORES, None, True), {}),
        ("backward", OPS._flash_attn_backward,
         (out, q, k, v, out, lse, *grads, 0.0, *_SCORES, slopes, False), {}),
        ("backward-dropout", OPS._flash_attn_backward,
         (out, q, k, v, out, lse, *grads, 0.2, *_SCORES, None, True, rng_state), {}),
        ("backward-without-buffers", OPS._flash_attn_backward,
         (out, q, k, v, out, lse, None, None, None, 0.0, *_SCORES, None, False), {}),
        ("varlen_forward", OPS._flash_attn_varlen_forward,
         (pq, pk, pv, *lengths, 0.0, *_SCORES), {}),
        ("varlen_forward-dropout", OPS._flash_attn_varlen_forward,
         (pq, pk, pv, *lengths, 0.2, *_SCORES, None, True), {}),
        ("varlen_forward-pages", OPS._flash_attn_varlen_forward,
         (pq, *pages, *lengths, 0.0, *_SCORES), {"block_table": table}),
        ("varlen_forward-seqused", OPS._flash_attn_varlen_forward,
         (pq, pk, pv, *lengths, 0.0, *_SCORES), {"seqused_k": used}),
        ("varlen_backward", OPS._flash_attn_varlen_backward,
         (pout, pq, pk, pv, pout, plse, *pgrads, *lengths, 0.0, *_SCORES, None, False), {}),
        ("kvcache", OPS._flash_attn_with_kvcache,
         (q[:, :2], *caches, *new, *[None] * 3, used, *[None] * 10, *cache_tail), {}),
        ("kvcache-pages", OPS._flash_attn_with_kvcache,
         (q[:, :2], *pages, *new, *[None] * 3, used, None, None, table, *[None] * 7, *cache_tail),
         {}),
        ("fa3_forward", OPS_3._flash_attn_forward, (q, k, v),
         {"causal": True, "attention_chunk": 4}),
        ("fa3_forward-varlen", OPS_3._flash_attn_forward, (pq, pk, pv),
         {"cu_seqlens_q": CU, "cu_seqlens_k": CU.clone(), "max_seqlen_q": 5, "max_seqlen_k": 5}),
        ("fa3_backward", OPS_3._flash_attn_backward, (out, q, k, v, out, lse),
         dict(zip(("dq", "dk", "dv"), grads))),
    ]  # fmt: skip


OPERATORS = operator_rows()


@pytest.mark.parametrize(
    ("name", "op", "args", "kwargs"), OPERATORS, ids=[row[0] for row in OPERATORS]
)
def test_operator_passes_opcheck(
    name: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    result = torch.library.opcheck(op.default, args, kwargs)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_with_a_fake_rule_is_checked() -> None:
    checked = {row[1].default._schema.name for row in OPERATORS}
    named = {
        str(torch._C.parse_schema(name + schema).name) for name, schema in (*_ops.SCHEMAS.items(),)
    }
    assert named <= checked
    assert {f"flash_attn_3::_flash_attn_{x}" for x in ("forward", "backward")} <= checked


def with_dropout_of(seed: int, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Tensor) -> Any:
        torch.manual_seed(seed)
        return function(*inputs)

    return call


FP64 = torch.float64
SLOPES = torch.tensor([[0.3, 0.1], [0.2, 0.7]])
CU_5 = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
GRADCHECKS: list[Row] = [
    ("varlen-causal", lambda q, k, v: flash_attn.flash_attn_varlen_func(
        q, k, v, CU_5, CU_5, 3, 3, causal=True),
     (normal(5, 2, 3, dtype=FP64), normal(5, 1, 3, dtype=FP64), normal(5, 1, 3, dtype=FP64))),
    ("varlen_kvpacked-window", lambda q, kv: flash_attn.flash_attn_varlen_kvpacked_func(
        q, kv, CU_5, CU_5, 3, 3, window_size=(1, 1), softcap=3.0),
     (normal(5, 2, 3, dtype=FP64), normal(5, 2, 2, 3, dtype=FP64))),
    ("varlen_qkvpacked-alibi", lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(
        qkv, torch.tensor([0, 2, 5], dtype=torch.int32), 3, alibi_slopes=SLOPES),
     (normal(5, 3, 2, 3, dtype=FP64),)),
    ("varlen-dropout", with_dropout_of(1, lambda q, k, v: flash_attn.flash_attn_varlen_func(
        q, k, v, CU_5, CU_5, 3, 3, 0.4)),
     (normal(5, 2, 3, dtype=FP64), normal(5, 2, 3, dtype=FP64), normal(5, 2, 3, dtype=FP64))),
    ("kvpacked-gqa-dropout", with_dropout_of(2, lambda q, kv: flash_attn.flash_attn_kvpacked_func(
        q, kv, 0.4, causal=True)),
     (normal(1, 4, 4, 2, dtype=FP64), normal(1, 5, 2, 2, 2, dtype=FP64))),
    ("same-tensor", lambda x: flash_attn.flash_attn_func(x, x, x, causal=True),
     (normal(1, 4, 2, 3, dtype=FP64),)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "function", "inputs"), GRADCHECKS, ids=[row[0] for row in GRADCHECKS]
)
def test_gradients_are_the_derivative(
    name: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> None:
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, leaves)


# --- FLOPs --------------------------------------------------------------------------------------


def flops_of(function: Callable[..., Any], inputs: tuple[Tensor, ...], backward: bool) -> int:
    leaves = [x.clone().requires_grad_(backward) for x in inputs]
    with FlopCounterMode(display=False) as counter:
        out = function(*leaves)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


_PAIRS = B * HQ * S * (S + 3)
_PAIRS_PACKED = HQ * (4 * 4 + 5 * 5)
FLOPS = [
    ("func", lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True), dense(), _PAIRS),
    ("varlen", lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5), packed(),
     _PAIRS_PACKED),
    ("fa3_func", fa3.flash_attn_func, dense(), _PAIRS),
    ("fa3_varlen", lambda q, k, v: fa3.flash_attn_varlen_func(q, k, v, CU, CU, 5, 5), packed(),
     _PAIRS_PACKED),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "function", "inputs", "pairs"), FLOPS, ids=[row[0] for row in FLOPS]
)
def test_flops_are_those_of_the_matrix_products(
    name: str, function: Callable[..., Any], inputs: tuple[Tensor, ...], pairs: int
) -> None:
    # 2 products of 2 d FLOPs a pair forward, 5 backward: torch counts its own attention so.
    assert flops_of(function, inputs, backward=False) == 4 * D * pairs
    assert flops_of(function, inputs, backward=True) == (4 + 10) * D * pairs


def test_flops_agree_with_those_of_torchs_attention() -> None:
    q, k, v = normal(B, S, HQ, D), normal(B, S, HQ, D), normal(B, S, HQ, D)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # torch counts no operator of its CPU kernels; the plain products are what it counts.
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        return scores.softmax(dim=-1) @ v.transpose(1, 2)

    ours = flops_of(flash_attn.flash_attn_func, (q, k, v), backward=False)
    assert ours == flops_of(sdpa, (q, k, v), backward=False)


def test_flops_of_a_second_query_are_those_of_one_more_product() -> None:
    q, k, v = normal(B, S, HQ, D), normal(B, S, 1, D), normal(B, S, 1, 2 * D)
    qv = normal(B, S, HQ, 2 * D)
    one = flops_of(lambda q: fa3.flash_attn_func(q, k, v), (q,), backward=False)
    for function in (
        lambda q: fa3.flash_attn_func(q, k, v, qv=qv),
        lambda q: fa3.flash_attn_with_kvcache(q, k, v, qv=qv),
    ):
        assert 3 * flops_of(function, (q,), backward=False) == 5 * one


@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "paged"])
def test_flops_of_the_cache_count_its_whole_length(is_paged: bool) -> None:
    q = normal(B, 2, HQ, D)
    cache = normal(B, 12, HK, D)
    table = None
    if is_paged:
        cache, table = cache.reshape(6, 4, HK, D), torch.arange(6, dtype=torch.int32).view(B, 3)

    def function(q: Tensor) -> Tensor:
        return flash_attn.flash_attn_with_kvcache(q, cache, cache, block_table=table)

    assert flops_of(function, (q,), backward=False) == 4 * D * B * HQ * 2 * 12


# --- Checkpointing ------------------------------------------------------------------------------


class Names(TorchDispatchMode):
    """Counts the operators of this package that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "flash_attn" in func.namespace:
            self.seen.append(func._schema.name.split("_flash_attn_")[-1])
        return func(*args, **(kwargs or {}))


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn.flash_attn_func(q * 2, k, v, 0.3, causal=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant: bool) -> None:
    results = []
    for function in (dropping, partial(checkpoint, dropping, use_reentrant=use_reentrant)):
        leaves = [x.requires_grad_() for x in dense()]
        torch.manual_seed(5)
        out = function(*leaves)
        torch.rand(3)  # the recomputation must not depend on what is drawn in between
        out.square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    assert equal(*results)


@pytest.mark.skipif(
    not hasattr(checkpointing, "CheckpointPolicy"), reason="torch 2.5 brought checkpoint policies"
)
@pytest.mark.parametrize("saves", [False, True], ids=["recompute", "save"])
def test_selective_checkpointing_obeys_the_policy(saves: bool) -> None:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        if saves and op is OPS._flash_attn_forward.default:
            return checkpointing.CheckpointPolicy.MUST_SAVE
        return checkpointing.CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(checkpointing.create_selective_checkpoint_contexts, policy)
    leaves = [x.requires_grad_() for x in dense()]
    torch.manual_seed(5)
    out = checkpoint(dropping, *leaves, use_reentrant=False, context_fn=contexts)
    with Names() as names:
        got = torch.autograd.grad(out.square().sum(), leaves)
    assert names.seen == (["backward"] if saves else ["forward", "backward"])
    torch.manual_seed(5)
    expected = torch.autograd.grad(dropping(*leaves).square().sum(), leaves)
    assert equal([*got], [*expected])


# --- Who sees a call ----------------------------------------------------------------------------


class Kind(Tensor):
    """A kind of tensor that may have rules of its own for an operator."""


class NotedFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_only_calls_that_nobody_sees_are_unwatched() -> None:
    q, k, v = dense()
    seen: dict[str, bool] = {}

    def noting(name: str, *packed: Tensor) -> Tensor:
        seen[name] = _attention.is_watched(packed)
        return packed[0]

    noting("eager", q, k, v)
    noting("parameter", torch.nn.Parameter(q), k)
    with torch.no_grad():
        noting("without gradients", q)
    assert not any(seen.values()), seen
    seen.clear()
    noting("a kind of tensor", q, k, v.as_subclass(Kind))
    with Names():
        noting("a dispatch mode", q)
    with NotedFunctions():
        noting("a function mode", q)
    with FakeTensorMode() as mode:
        noting("a fake tensor's mode", q)
    noting("a fake tensor", mode.from_tensor(q))
    torch.vmap(partial(noting, "a transform"))(q)
    torch.jit.trace(lambda x: noting("a tracer", x), (q,), check_trace=False)
    assert all(seen.values()), seen
    assert len(seen) == 7
    assert torch.compile(lambda x: x + _attention.is_watched((x,)), backend="eager")(q).equal(q + 1)


def test_a_tensor_that_escaped_a_transform_has_its_gradient() -> None:
    q, k, v = dense()
    escaped = []

    def keep(x: Tensor) -> Tensor:
        escaped.append(x)
        return x.sum()

    leaf = q.clone().requires_grad_()
    torch.func.grad(keep)(leaf)
    got = torch.autograd.grad(flash_attn.flash_attn_func(escaped[0], k, v).sum(), leaf)
    expected = torch.autograd.grad(flash_attn.flash_attn_func(leaf, k, v).sum(), leaf)
    assert equal([*got], [*expected])


# --- Transforms ---------------------------------------------------------------------------------


def test_vmap_equals_a_loop() -> None:
    x = normal(3, B, S, HQ, D)
    function = partial(flash_attn.flash_attn_func, causal=True)
    with torch.no_grad():
        got = torch.vmap(function)(x, x, x)
        expected = torch.stack([function(row, row, row) for row in x])
    assert torch.equal(got, expected)


def test_a_second_derivative_is_an_error() -> None:
    leaves = [x.requires_grad_() for x in dense()]
    out = flash_attn.flash_attn_func(*leaves)
    gradients = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    # A loss may join first derivatives with what does have a graph: no silent part of a gradient.
    with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
        (sum(g.sum() for g in gradients) + leaves[0].sum()).backward()


def test_forward_mode_is_an_error() -> None:
    q, k, v = dense()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: flash_attn.flash_attn_func(x, k, v), (q,), (torch.ones_like(q),))


def test_functional_gradient_works_or_says_why_not() -> None:
    q, k, v = dense()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: flash_attn.flash_attn_func(x, k, v).sum())(q)


def test_autocast_leaves_the_operands_as_they_are() -> None:
    q, k, v = dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attn.flash_attn_func(q, k, v).dtype == torch.float32
        with pytest.raises(RuntimeError, match="query and key must have the same dtype"):
            flash_attn.flash_attn_func(q.bfloat16(), k, v)
