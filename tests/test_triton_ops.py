"""`flash_attn.ops.triton` and what stands on it: the kernels, in Triton's interpreter on a machine
without a GPU, and torch's way on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import check
from small_calls import compiles
from torch import Tensor
from triton_here import DEVICE, old_numbers, on_device, why_not

from flash_attn._rotary import batch_positions, rotate, varlen_positions
from flash_attn.backends import triton
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from flash_attn.ops.triton.rotary import apply_rotary

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
pytestmark = old_numbers


@pytest.fixture(params=["torch", pytest.param("triton", marks=on_device)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device whose tensors go the way that the parameter names."""
    if request.param == "torch":
        return "cpu"
    if why_not():
        pytest.skip(why_not())
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "triton")
    assert triton.serves(torch.zeros(1, device=DEVICE))
    return DEVICE


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MODULES = (
    "flash_attn.ops.triton.rotary",
    "flash_attn.ops.triton.cross_entropy",
    "flash_attn.ops.triton.layer_norm",
    "flash_attn.layers.rotary",
    "flash_attn.losses.cross_entropy",
)


@pytest.mark.parametrize("module", MODULES)
def test_import_needs_neither_gpu_nor_triton(module: str) -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'triton': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"import {module}\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


# --- Rotary -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary_turns_a_batch(interleaved: bool, conjugate: bool, inplace: bool, way: str) -> None:
    b, s, h, d, half = 2, 37, 3, 40, 12
    angle = normal(50, half, seed=1)
    offsets = torch.tensor([3, 11])
    for dtype, cos_dtype in ((BF16, BF16), (FP16, FP32), (FP32, FP32)):
        x, cos, sin = (
            normal(b, s, h, d).to(dtype),
            angle.cos().to(cos_dtype),
            angle.sin().to(cos_dtype),
        )
        positions = batch_positions(s, offsets, x.device)
        tables = cos.double(), sin.double(), positions, interleaved, conjugate
        expected = rotate(x.double(), *tables)
        given = x.transpose(1, 2).contiguous().transpose(1, 2).to(way)
        got = apply_rotary(
            given,
            cos.to(way),
            sin.to(way),
            offsets.to(way, torch.int32),
            interleaved=interleaved,
            inplace=inplace,
            conjugate=conjugate,
        )
        check(f"{dtype}", got, expected, expected.to(dtype))
        assert (got.data_ptr() == given.data_ptr()) == inplace
        if not inplace:
            assert torch.equal(given.cpu(), x)


def test_rotary_turns_packed_sequences(way: str) -> None:
    cu_seqlens = torch.tensor([0, 5, 5, 40], dtype=torch.int32)
    x, angle = normal(44, 2, 16).to(BF16), normal(64, 8, seed=1)
    cos, sin = angle.cos(), angle.sin()
    got = apply_rotary(x.to(way), cos.to(way), sin.to(way), 4, cu_seqlens.to(way), 35)
    positions = varlen_positions(44, cu_seqlens, 4)
    expected = rotate(x.double(), cos.double(), sin.double(), positions, False)
    check("owned", got[:40], expected[:40], expected[:40].to(BF16))
    assert got[40:].isfinite().all()


def test_the_rotary_layers_gradients_turn_back(way: str) -> None:
    x, dout = (normal(2, 9, 3, 32, seed=n).to(FP16) for n in range(2))
    angle = normal(20, 16, seed=2)
    cos, sin = angle.cos(), angle.sin()
    leaf = x.clone().to(way).requires_grad_()
    out = apply_rotary_emb(leaf, cos.to(way), sin.to(way), seqlen_offsets=2)
    (grad,) = torch.autograd.grad(out, leaf, dout.to(way))
    tables = cos.double(), sin.double(), batch_positions(9, 2, x.device)
    for name, got, expected in (
        ("out", out.detach(), rotate(x.double(), *tables, False)),
        ("grad", grad, rotate(dout.double(), *tables, False, conjugate=True)),
    ):
        check(name, got, expected, expected.to(FP16))


@pytest.mark.parametrize("layout", ["plain", "headsfirst"])
def test_packed_qkv_is_turned_in_place(layout: str, way: str) -> None:
    qkv, angle = normal(2, 9, 3, 4, 16).to(BF16), normal(9, 8, seed=1)
    cos, sin = angle.cos(), angle.sin()
    given = qkv.clone().to(way)
    if layout == "headsfirst":
        given = given.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    assert apply_rotary_emb_qkv_(given, cos.to(way), sin.to(way)) is given
    tables = cos.double(), sin.double(), batch_positions(9, 0, qkv.device), False
    for n in range(2):
        expected = rotate(qkv[:, :, n].double(), *tables)
        check("qk"[n], given[:, :, n], expected, expected.to(BF16))
    assert torch.equal(given[:, :, 2].cpu(), qkv[:, :, 2])


def test_rotary_kernel_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    import flash_attn.ops.triton.rotary as module

    with monkeypatch.context() as patch:
        patch.setattr(triton, "is_installed", lambda: False)
        with pytest.raises(ImportError, match="pip install 'triton"):
            _ = module.rotary_kernel
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name
    pytest.importorskip("triton", reason="Triton is not installed")
    assert module.rotary_kernel.fn.__name__ == "rotary_kernel"


RULES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": normal(2, 5, 8)}, ValueError, "must be"),
    ({"cos": normal(5, 9), "sin": normal(5, 9)}, ValueError, "rotary_dim must be <= headdim"),
    ({"sin": normal(5, 3)}, ValueError, "both must be"),
    ({"seqlen_offsets": 1}, ValueError, "seqlen_ro must be >="),
    ({"seqlen_offsets": torch.zeros(2)}, TypeError, "int32 or int64"),
]


@pytest.mark.parametrize(("changed", "kind", "told"), RULES, ids=[r[2] for r in RULES])
def test_rotary_refuses(changed: dict[str, Any], kind: type[Exception], told: str) -> None:
    given = {"x": normal(2, 5, 3, 16), "cos": normal(5, 8), "sin": normal(5, 8), **changed}
    with pytest.raises(kind, match=f"^apply_rotary: .*{told}"):
        apply_rotary(**given)


# --- Cross entropy ------------------------------------------------------------------------------


def loss_oracle(
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    scale: float,
    square: float,
    ignore: int = -100,
) -> tuple[Tensor, Tensor]:
    """(losses, z_losses) by torch's own cross entropy."""
    x = logits * scale
    z = square * torch.logsumexp(x, 1).square()
    z = torch.where(labels == ignore, 0.0, z)
    losses = torch.nn.functional.cross_entropy(
        x, labels, reduction="none", label_smoothing=smoothing, ignore_index=ignore
    )
    return losses + z, z


LOSSES = [
    (7, 1000, FP32, 0.0, 1.0, 0.0),
    (7, 5003, BF16, 0.0, 1.0, 0.0),
    (5, 64, FP16, 0.1, 0.7, 1e-3),
    (3, 9001, BF16, 0.2, 1.3, 1e-4),
    (1, 1, FP32, 0.0, 1.0, 0.1),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("n", "v", "dtype", "smoothing", "scale", "square"), LOSSES)
def test_cross_entropy_and_its_gradient(
    n: int,
    v: int,
    dtype: torch.dtype,
    smoothing: float,
    scale: float,
    square: float,
    inplace: bool,
    way: str,
) -> None:
    logits, dlosses = (3 * normal(n, v)).to(dtype), normal(n, seed=1)
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(2))
    labels[n // 2] = -100 if n > 1 else labels[0]
    runs = []
    for wide in (FP64, dtype):
        leaf = logits.to(wide).requires_grad_()
        losses, z = loss_oracle(leaf, labels, smoothing, scale, square)
        runs.append([losses, z, *torch.autograd.grad(losses, leaf, dlosses.to(losses.dtype))])
    leaf = logits.clone().to(way).requires_grad_()
    got = cross_entropy_loss(
        leaf * 1 if inplace else leaf,
        labels.to(way),
        label_smoothing=smoothing,
        logit_scale=scale,
        lse_square_scale=square,
        inplace_backward=inplace,
    )
    assert [x.dtype for x in got] == [FP32, FP32]
    assert not got[1].requires_grad
    grads = torch.autograd.grad(got[0], leaf, dlosses.to(way))
    for name, x, exact, low in zip(("losses", "z_losses", "dlogits"), (*got, *grads), *runs):
        check(name, x.detach(), exact.detach(), low.detach())


def test_cross_entropy_takes_a_known_lse_and_ignores_rows_of_anything(way: str) -> None:
    logits, labels = normal(4, 50), torch.tensor([3, 7, 7, 49])
    lse = torch.logsumexp(logits, 1)
    logits[1] = float("nan")
    leaf = logits.clone().to(way).requires_grad_()
    losses, _ = cross_entropy_loss(leaf, labels.to(way), (lse + 1).to(way), ignore_index=7)
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=7, reduction="none")
    rows = torch.tensor([0, 3])
    torch.testing.assert_close(losses.detach().cpu()[rows], expected[rows] + 1)
    assert losses.detach().cpu()[1:3].tolist() == [0.0, 0.0]
    losses.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[1:3].cpu(), torch.zeros(2, 50))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_module_reduces_over_labels_that_count(reduction: str, way: str) -> None:
    logits, labels = normal(6, 40), torch.tensor([0, 5, -100, 39, -100, 7])
    module = CrossEntropyLoss(reduction=reduction, lse_square_scale=0.01, return_z_loss=True)
    losses, z = loss_oracle(logits.double(), labels, 0.0, 1.0, 0.01)
    got = module(logits.to(way), labels.to(way))
    for x, rows in zip(got, (losses, z)):
        reduced = {"mean": rows.sum() / 4, "sum": rows.sum(), "none": rows}[reduction]
        torch.testing.assert_close(x.cpu().double(), reduced, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="reduction is 'max'"):
        CrossEntropyLoss(reduction="max")


@compiles
def test_cross_entropy_compiles() -> None:
    logits, labels = normal(6, 40).requires_grad_(), torch.tensor([0, 5, -100, 39, -100, 7])
    compiled = torch.compile(CrossEntropyLoss(), fullgraph=True, backend="aot_eager")
    results = []
    for function in (CrossEntropyLoss(), compiled):
        loss = function(logits, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1])


def _losses_of_a_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    logits, labels = normal(5, 20), torch.tensor([0, 19, 10, -100, 9])
    leaf = logits[:, 10 * rank : 10 * rank + 10].clone().requires_grad_()
    group = torch.distributed.group.WORLD
    losses, _ = cross_entropy_loss(
        leaf, labels, label_smoothing=0.1, lse_square_scale=0.01, process_group=group
    )
    losses.sum().backward()
    torch.save((losses.detach(), leaf.grad), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_classes_may_be_spread_over_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_losses_of_a_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    leaf, labels = normal(5, 20).double().requires_grad_(), torch.tensor([0, 19, 10, -100, 9])
    losses, _ = loss_oracle(leaf, labels, 0.1, 1.0, 0.01)
    losses.sum().backward()
    for got, _ in ranks:
        torch.testing.assert_close(got.double(), losses.detach(), rtol=1e-5, atol=1e-6)
    grad = torch.cat([part for _, part in ranks], dim=1).double()
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"must be \(n, v\) and \(n,\)"),
        ({"logits": normal(2, 3, 4)}, r"must be \(n, v\)"),
        ({"precomputed_lse": torch.zeros(1)}, "precomputed_lse has shape"),
    ],
)
def test_cross_entropy_refuses(changed: dict[str, Any], told: str) -> None:
    given = {"logits": normal(2, 4), "labels": torch.zeros(2, dtype=torch.int64), **changed}
    with pytest.raises(ValueError, match=f"^cross_entropy_loss: .*{told}"):
        cross_entropy_loss(**given)


# --- Layer norm and RMS norm --------------------------------------------------------------------


def norm_oracle(
    z: Tensor, weight: Any, bias: Any, eps: float, is_rms: bool, shift: float = 0.0
) -> Tensor:
    """The norm by torch's own functions."""
    weight = None if weight is None else weight + shift
    if not is_rms:
        return torch.nn.functional.layer_norm(z, z.shape[-1:], weight, bias, eps)
    y = torch.nn.functional.rms_norm(z, z.shape[-1:], weight, eps)
    return y if bias is None else y + bias


NORMS = [
    # n, dtype, dtype of weights, residual, weight, bias, prenorm
    (64, FP32, FP32, False, True, True, False),
    (100, BF16, FP32, True, True, False, True),
    (257, FP16, FP16, True, True, True, False),
    (1000, BF16, BF16, False, False, False, True),
    (1, FP32, FP32, True, True, True, True),
]


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize(
    ("n", "dtype", "wdtype", "has_residual", "has_w", "has_b", "prenorm"), NORMS
)
def test_norms_and_their_gradients(
    n: int,
    dtype: torch.dtype,
    wdtype: torch.dtype,
    has_residual: bool,
    has_w: bool,
    has_b: bool,
    prenorm: bool,
    is_rms: bool,
    way: str,
) -> None:
    eps, shape = 1e-5, (3, 7, n)
    given = {
        "x": normal(*shape).to(dtype),
        "residual": normal(*shape, seed=1).to(FP32) if has_residual else None,
        "weight": normal(n, seed=2).to(wdtype) if has_w else None,
        "bias": normal(n, seed=3).to(wdtype) if has_b else None,
    }
    leaves = {name: x for name, x in given.items() if x is not None}
    douts = [normal(*shape, seed=4).to(dtype), normal(*shape, seed=5)][: 1 + prenorm]
    runs = []
    for wide in (FP64, dtype):
        copies = {name: x.to(wide).requires_grad_() for name, x in leaves.items()}
        z = copies["x"] + copies.get("residual", 0.0)
        y = norm_oracle(z, copies.get("weight"), copies.get("bias"), eps, is_rms)
        outs = [y, z][: 1 + prenorm]
        grads = torch.autograd.grad(outs, [*copies.values()], [x.to(wide) for x in douts])
        runs.append([*outs, *grads])
    copies = {name: x.clone().to(way).requires_grad_() for name, x in leaves.items()}
    function = rms_norm_fn if is_rms else layer_norm_fn
    result = function(**{**given, **copies}, eps=eps, prenorm=prenorm)
    outs = list(result) if prenorm else [result]
    assert outs[0].dtype == dtype
    if prenorm:
        assert outs[1].dtype == (FP32 if has_residual else dtype)
    douts = [dout.to(way, out.dtype) for dout, out in zip(douts, outs)]
    grads = torch.autograd.grad(outs, [*copies.values()], douts)
    assert [x.dtype for x in grads] == [x.dtype for x in leaves.values()]
    for i, (got, exact, low) in enumerate(zip([*outs, *grads], *runs)):
        check(f"{i}", got.detach(), exact.detach(), low.detach())


def test_a_second_norm_reads_the_same_sum(way: str) -> None:
    x, x1, residual = (normal(4, 48, seed=n).to(BF16) for n in range(3))
    w, b, w1 = (normal(48, seed=n) for n in range(3, 6))
    scale = torch.rand(4, generator=torch.Generator().manual_seed(6))
    z = x.double() * scale.double()[:, None] + x1.double() + residual.double()
    tensors = (x, w, b, residual, x1, w1)
    y, y1, summed = layer_norm_fn(
        *(t.to(way) for t in tensors),
        eps=1e-5,
        rowscale=scale.to(way),
        prenorm=True,
        zero_centered_weight=True,
    )
    expected = (
        norm_oracle(z, w.double(), b.double(), 1e-5, False, shift=1.0),
        norm_oracle(z, w1.double(), None, 1e-5, False, shift=1.0),
        z,
    )
    for name, got, exact in zip(("y", "y1", "z"), (y, y1, summed), expected):
        check(name, got, exact, exact.to(BF16))


def test_dropout_before_a_norm_keeps_what_its_mask_says(way: str) -> None:
    x = torch.ones(50, 64, device=way)
    torch.manual_seed(0)
    y, z, kept, kept1 = rms_norm_fn(
        x, None, None, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert kept1 is None
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(z, kept / 0.75)
    torch.testing.assert_close(y, norm_oracle(z.cpu(), None, None, 1e-6, True).to(way))


def test_norms_write_where_they_are_told_to(way: str) -> None:
    x, residual = (normal(4, 48, seed=n).to(way) for n in range(2))
    out, z = torch.empty_like(x), torch.empty_like(x)
    assert layer_norm_fn(x, None, None, residual, out=out, residual_out=z) is out
    torch.testing.assert_close(z, x + residual)
    torch.testing.assert_close(out, norm_oracle(z, None, None, 1e-6, False))
    y, z = layer_norm_fn(x.half(), None, None, prenorm=True, residual_in_fp32=True, out_dtype=BF16)
    assert (y.dtype, z.dtype) == (BF16, FP32)


def test_the_module_drops_in_training_only(way: str) -> None:
    module = RMSNorm(32, dropout_p=0.5, zero_centered_weight=True, device=way)
    assert not module.weight.any()
    x = normal(3, 32).to(way)
    expected = norm_oracle(x, None, None, 1e-5, True)
    assert not torch.allclose(module(x), expected)
    torch.testing.assert_close(module.eval()(x), expected)
    _, z = module(x, residual=x, prenorm=True)
    torch.testing.assert_close(z, 2 * x)


@compiles
def test_norms_compile() -> None:
    x, w = normal(3, 32).requires_grad_(), normal(32, seed=1).requires_grad_()
    compiled = torch.compile(rms_norm_fn, fullgraph=True, backend="aot_eager")
    results = []
    for function in (rms_norm_fn, compiled):
        y, z = function(x, w, None, residual=x.detach(), prenorm=True)
        results.append((y, z, *torch.autograd.grad(y.sum() + z.sum(), (x, w))))
    torch.testing.assert_close(results[0], results[1])


def test_norms_refuse_shapes_that_do_not_fit() -> None:
    x = normal(2, 8)
    for name, shape in (("weight", (4,)), ("residual", (8,)), ("rowscale", (8,))):
        given = {"weight": None, "bias": None, name: torch.zeros(shape)}
        with pytest.raises(ValueError, match=f"^layer_norm_fn: {name} has shape"):
            layer_norm_fn(x, **given)
