"""PyTorch's own attention with these kernels under it, where a program asks for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu
import pytest
import torch
import torch.nn.functional as F
import under_sdpa
from compare import check
from problem_types import BF16, FP16, FP64, Problem, varlen
from running import oracle_results
from small_calls import COMPILES
from torch import Tensor
from torch.nn import attention

from flash_attn import _sdpa

if "flash_attn" not in getattr(attention, "list_flash_attention_impls", list)():
    pytest.skip("this torch cannot put other kernels under SDPA", allow_module_level=True)

pytestmark = [
    *COMPILES,
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning"),
]
SMALL = gpu.Case("bfloat16", batch=2, seqlen=64, heads=2, head_dim=32, causal=True)


@pytest.fixture
def activated() -> Iterator[None]:
    under_sdpa.switch(gpu.OURS)
    yield
    under_sdpa.switch(gpu.THEIRS)


def test_methods_are_switched_and_switched_back() -> None:
    for method, found in ((gpu.OURS, "flash_attn"), (gpu.OURS, "flash_attn"), (gpu.THEIRS, None)):
        under_sdpa.switch(method)
        assert attention.current_flash_attention_impl() == found


def test_a_measurement_has_both_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    active = []

    def timer(call: Callable[[], Any], count: int) -> list[float]:
        call()
        active.append(attention.current_flash_attention_impl())
        return [4.0] * count

    rows = gpu.measure(SMALL, timer, "cpu", make=under_sdpa.Calls)
    assert [row["passes"] for row in rows] == list(gpu.PASSES)
    assert active.count("flash_attn") == active.count(None) > 0
    for name, value in (("CPU_SHAPE", (1, 8, 1, 8)), ("CPU_ROUNDS", 3), ("CPU_CALLS", 2)):
        monkeypatch.setattr(gpu, name, value)
    cpu = under_sdpa.cpu_times("cpu")
    assert [row["gradients"] for row in cpu] == [False, True]
    assert all(set(row["us"]) == set(gpu.METHODS) for row in cpu)
    assert attention.current_flash_attention_impl() is None


def kernels_of(call: Callable[[], Any]) -> set[str]:
    """What of ours a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    return {name for name in names if name.startswith("flash_")}


def gradients(out: Tensor, inputs: list[Tensor], dout: Tensor) -> dict[str, Tensor]:
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, dout)))


def assert_follows_rule(problem: Problem, got: dict[str, Tensor]) -> None:
    tensors = problem.tensors("cpu")
    exact, low = (oracle_results(problem, tensors, dtype) for dtype in (FP64, problem.low_dtype))
    for name, value in got.items():
        check(f"{problem} {name}", value, exact[name], low[name])


@pytest.mark.parametrize("is_usual", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_dense_operators_follow_the_rule(causal: bool, is_usual: bool, device: str) -> None:
    problem = Problem(sq=65, sk=65, d=64, hq=4, hk=2, causal=causal, dtype=BF16)
    tensors = problem.tensors(device)
    heads_first = [x.transpose(1, 2) for x in (*tensors.leaves, tensors.dout)]
    if not is_usual:
        heads_first = [x.contiguous() for x in heads_first]
    q, k, v, dout = heads_first
    results = _sdpa._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)
    out, lse, starts_q, starts_k, sq, sk, state, unused, s_dmask = results
    assert out.stride() == torch.empty_like(q).stride()
    assert (starts_q, starts_k, sq, sk, s_dmask.numel()) == (None, None, 65, 65, 0)
    grads = _sdpa._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, starts_q, starts_k, sq, sk, 0.0, causal, state, unused
    )
    assert [x.stride() for x in grads] == [torch.empty_like(x).stride() for x in (q, k, v)]
    rows = (x.transpose(1, 2) for x in (out, *grads))
    assert_follows_rule(problem, dict(zip(("out", "dq", "dk", "dv"), rows)))


@pytest.mark.parametrize("window", [(-1, -1), (20, 0)])
def test_packed_operators_follow_the_rule(window: tuple[int, int], device: str) -> None:
    problem = varlen((65, 1, 30), (65, 1, 30), hq=4, hk=2, d=64, window=window, dtype=BF16)
    tensors = problem.tensors(device)
    starts = (tensors.cu_seqlens_q, tensors.cu_seqlens_k, 65, 65)
    sides = {"window_size_left": window[0], "window_size_right": window[1]}
    out, lse, state, unused, _ = _sdpa._flash_attention_forward(
        *tensors.leaves, *starts, 0.0, False, False, **sides
    )
    grads = _sdpa._flash_attention_backward(
        tensors.dout, *tensors.leaves, out, lse, *starts, 0.0, False, state, unused, **sides
    )
    assert_follows_rule(problem, dict(zip(("out", "dq", "dk", "dv"), (out, *grads))))
    into = torch.full_like(out, float("nan"))
    rest = (0.0, False, False)
    again = _sdpa._flash_attention_forward_no_dropout_inplace(
        into, *tensors.leaves, *starts, *rest, **sides, num_splits=1
    )
    assert torch.equal(into, out)
    assert torch.equal(again, lse)


def test_the_state_of_dropout_reaches_the_backward(device: str) -> None:
    """out is linear in v: <out, dout> = <v, dv> where both drop the same."""
    q, k, v, dout = torch.randn(4, 2, 4, 130, 64, dtype=torch.bfloat16, device=device).unbind()
    out, lse, *rest = _sdpa._scaled_dot_product_flash_attention(q, k, v, 0.5)
    assert not torch.equal(_sdpa._scaled_dot_product_flash_attention(q, k, v, 0.5)[0], out)
    *sizes, state, unused, _ = rest
    tensors = (dout, q, k, v, out, lse)
    grads = _sdpa._scaled_dot_product_flash_attention_backward(
        *tensors, *sizes, 0.5, False, state, unused
    )
    one, other = (out.double() * dout).sum(), (v.double() * grads[2]).sum()
    assert (one - other).abs() < 0.02 * out.double().norm() * dout.double().norm() / 10


def test_settings_come_back() -> None:
    attention.restore_flash_attention_impl(_raise_warn=False)
    before = attention._cur_sdpa_kernel_backends(with_priority=True)
    for _ in range(2):
        under_sdpa.switch(gpu.OURS)
        assert attention._cur_sdpa_kernel_backends(with_priority=True)[0].name == "FLASH_ATTENTION"
        under_sdpa.switch(gpu.THEIRS)
        assert attention._cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.gpu
@pytest.mark.parametrize(
    "problem",
    [
        *(Problem(sq=300, sk=300, d=d, causal=d != 192, dtype=BF16) for d in (64, 96, 128, 192)),
        Problem(sq=129, sk=129, d=256, hq=4, hk=4, causal=True, dtype=FP16),
        Problem(sq=100, sk=700, d=72, hq=4, hk=2, dtype=BF16),
        Problem(sq=1, sk=65, d=128, hq=8, hk=1, dtype=FP16),
    ],
    ids=str,
)
def test_sdpa_follows_the_rule(problem: Problem, activated: None) -> None:
    tensors = problem.tensors("cuda")
    inputs = [x.detach().requires_grad_() for x in tensors.leaves]

    def run() -> dict[str, Tensor]:
        heads_first = [x.transpose(1, 2) for x in inputs]
        options = {"is_causal": problem.causal, "enable_gqa": problem.hq != problem.hk}
        out = F.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)
        return {"out": out, **gradients(out, inputs, tensors.dout)}

    assert_follows_rule(problem, run())
    names = " ".join(kernels_of(run))
    assert "flash_fwd_" in names
    assert "flash_bwd_" in names


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


SMALL_PROBLEM = Problem(sq=300, sk=300, hq=4, hk=4, d=64, causal=True, dtype=BF16)


@pytest.mark.gpu
def test_compiled_sdpa_follows_the_rule(activated: None) -> None:
    tensors = SMALL_PROBLEM.tensors("cuda")
    inputs = [x.detach().requires_grad_() for x in tensors.leaves]
    out = torch.compile(causal_sdpa)(*inputs)
    assert_follows_rule(SMALL_PROBLEM, {"out": out, **gradients(out, inputs, tensors.dout)})


@pytest.mark.gpu
def test_sdpa_is_captured_and_repeated(activated: None) -> None:
    tensors = SMALL_PROBLEM.tensors("cuda")
    inputs = [x.detach().requires_grad_() for x in tensors.leaves]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = causal_sdpa(*inputs)
        with torch.cuda.graph(graph):
            captured = causal_sdpa(*inputs)
    graph.replay()
    assert torch.equal(captured, expected)
    torch.use_deterministic_algorithms(True)
    try:
        found = [gradients(causal_sdpa(*inputs), inputs, tensors.dout) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x[name], found[0][name]) for x in found for name in x)


@pytest.mark.gpu
def test_packed_sequences_follow_the_rule(activated: None) -> None:
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    problem = varlen((300, 1, 129), (300, 1, 129), hq=4, hk=4, d=128, dtype=BF16)
    tensors = problem.tensors("cuda")
    inputs = [x.detach().requires_grad_() for x in tensors.leaves]
    starts = (tensors.cu_seqlens_q, tensors.cu_seqlens_k)

    def run() -> dict[str, Tensor]:
        out = varlen_attn(*inputs, *starts, 300, 300)
        return {"out": out, **gradients(out, inputs, tensors.dout)}

    assert_follows_rule(problem, run())
    assert any("flash_bwd_" in name for name in kernels_of(run))


@pytest.mark.gpu
def test_nested_tensors_and_masks(activated: None) -> None:
    parts = [torch.randn(n, 4, 64, dtype=torch.bfloat16, device="cuda") for n in (300, 37)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    out = F.scaled_dot_product_attention(nested, nested, nested).transpose(1, 2)
    for part, found in zip(parts, out.unbind()):
        x = part.transpose(0, 1)[None]
        assert torch.equal(F.scaled_dot_product_attention(x, x, x)[0].transpose(0, 1), found)
    x = parts[0].transpose(0, 1)[None]
    masks = {"attn_mask": torch.zeros(300, 300, dtype=torch.bfloat16, device="cuda")}
    assert not kernels_of(lambda: F.scaled_dot_product_attention(x, x, x, **masks))
    assert kernels_of(lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5))
