"""The FlashAttention-Plus interface: signatures, modules, environment variable, head dims, dtypes
and errors, on the Triton kernels (interpreted on a machine without a GPU), backward included.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cache_problem import CacheProblem
from compare import check
from oracle import attention, varlen_attention
from problem_types import BF16, FP16, FP64, Problem, cumulative
from running import (
    assert_cache_follows_rule,
    assert_follows_rule,
    published_cache_results,
    published_results,
)
from torch import Tensor
from triton_here import DEVICE, needs_triton, old_numbers, on_device

import flash_attn
from flash_attn import backends
from flash_attn._problem import Problem as Call
from flash_attn.modules.flash import FlashAttention
from flash_attn.modules.mha import FlashMHA

pytestmark = [needs_triton, old_numbers, *on_device]

HEAD_DIMS = (32, 40, 64, 80, 96, 128, 160, 192, 224, 256)


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is about GPU tensors; the interpreter takes CPU tensors when it is forced."""
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "TRUE")
    if DEVICE == "cuda":
        monkeypatch.delenv("FLASH_ATTN_BACKEND", raising=False)
    else:
        monkeypatch.setenv("FLASH_ATTN_BACKEND", "triton")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_switch_is_about_gpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_ATTN_BACKEND", raising=False)
    on_gpu = Call("cuda", "float16", 64, 64, capability=(9, 0))
    assert backends.choose(on_gpu) == "triton"
    assert backends.choose(Call("cpu", "float16", 64, 64)) == "cpu"


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_every_head_dim_and_dtype_forward_and_backward(d: int, dtype: torch.dtype) -> None:
    problem = Problem(b=1, sq=35, sk=40, hq=2, hk=1, d=d, dtype=dtype, causal=True)
    assert_follows_rule(problem, published_results(problem, problem.tensors(DEVICE), flash_attn))


def test_softcap_is_not_ignored() -> None:
    q, k, v = (4 * normal(1, 20, 2, 32, seed=n) for n in range(3))
    given = [x.to(DEVICE) for x in (q, k, v)]
    got = flash_attn.flash_attn_func(*given, softcap=5.0)
    plain = flash_attn.flash_attn_func(*given)
    exact, low = (
        attention(*(x.to(t) for x in (q, k, v)), softcap=5.0, dtype=t)[0] for t in (FP64, BF16)
    )
    check("out", got, exact, low)
    assert not torch.allclose(got, plain)


def test_packed_sequences_see_only_their_own_keys_and_have_lse_and_gradients() -> None:
    lens = (3, 17, 30)
    cu_seqlens = cumulative(lens, "cpu")
    q, k, v = (normal(50, 2, 32, seed=n) for n in range(3))
    leaves = [x.clone().to(DEVICE).requires_grad_() for x in (q, k, v)]
    cu = cu_seqlens.to(DEVICE)
    out, lse, _ = flash_attn.flash_attn_varlen_func(*leaves, cu, cu, 30, 30, return_attn_probs=True)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    runs = []
    for t in (FP64, BF16):
        copies = [x.to(t).requires_grad_() for x in (q, k, v)]
        o, s = varlen_attention(*copies, cu_seqlens, cu_seqlens, dtype=t)
        wide = o.to(torch.float32) if t == BF16 else o
        runs.append([o, s, *torch.autograd.grad(wide.square().sum(), copies)])
    for name, x, exact, low in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), *runs):
        check(name, x.detach(), exact.detach(), low.detach())


def test_a_kv_cache_works() -> None:
    problem = CacheProblem(dtype=BF16, sq=2, s_new=2, causal=True)
    assert_cache_follows_rule(problem, published_cache_results(problem, DEVICE, flash_attn))


# --- Modules ------------------------------------------------------------------------------------

_MHA = "(embed_dim, num_heads, dropout=0.0, causal=False, layer_idx=None, device=None, dtype=None)"
SIGNATURES: list[tuple[Any, str]] = [
    (
        FlashAttention,
        "(num_heads, head_dim, dropout=0.0, causal=False, window_size=(-1, -1), alibi_slopes=None)",
    ),
    (FlashMHA, _MHA),
    (FlashAttention.forward, "(self, q, k, v)"),
    (FlashAttention.reset_parameters, "(self)"),
]


@pytest.mark.parametrize(
    ("function", "documented"), SIGNATURES, ids=[row[0].__qualname__ for row in SIGNATURES]
)
def test_signatures_are_as_documented(function: Any, documented: str) -> None:
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == documented


def test_flash_attention_is_the_function_with_its_options() -> None:
    q, k, v = (normal(2, 19, 4, 32, seed=n).to(DEVICE) for n in range(3))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=DEVICE)
    module = FlashAttention(
        4, 32, dropout=0.5, causal=True, window_size=(6, -1), alibi_slopes=slopes
    )
    module.reset_parameters()
    options = {"causal": True, "window_size": (6, -1), "alibi_slopes": slopes}
    expected = flash_attn.flash_attn_func(q, k, v, **options)
    assert torch.equal(module.eval()(q, k, v), expected)
    assert not torch.equal(module.train()(q, k, v), expected)
    with pytest.raises(ValueError, match=r"it must be \(b, sq, 4, 32\)"):
        module(q[:, :, :2], k, v)


def test_flash_mha_trains() -> None:
    torch.manual_seed(0)
    module = FlashMHA(64, 2, causal=True, device=DEVICE, dtype=BF16)
    x = normal(2, 9, 64).to(DEVICE)
    out = module(x)
    assert out.shape == x.shape
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    changed = x.clone()
    changed[:, -1] = 0
    torch.testing.assert_close(module(changed)[:, :-1], out[:, :-1])


# --- Errors -------------------------------------------------------------------------------------

REFUSALS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((1, 5, 2, 264, BF16), RuntimeError, "head dimension at most 256"),
    ((1, 5, 2, 64, torch.float32), RuntimeError, "only support|supports? only|takes float16"),
    ((1, 5, 2, 64, torch.int32), RuntimeError, "only support|supports? only"),
]


@pytest.mark.parametrize(("given", "kind", "told"), REFUSALS, ids=[str(r[0]) for r in REFUSALS])
def test_errors_have_the_documented_class(
    given: tuple[Any, ...], kind: type[Exception], told: str
) -> None:
    *shape, dtype = given
    x = torch.zeros(*shape, dtype=dtype, device=DEVICE)
    with pytest.raises(kind, match=told):
        flash_attn.flash_attn_func(x, x, x)


def test_heads_that_do_not_divide_are_refused() -> None:
    x = torch.zeros(1, 5, 3, 32, dtype=BF16, device=DEVICE)
    with pytest.raises(RuntimeError, match="must divide number of heads in query"):
        flash_attn.flash_attn_func(x, x[:, :, :2], x[:, :, :2])
