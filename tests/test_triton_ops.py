"""`flash_attn.ops.triton` and what stands on it: the kernels, in Triton's interpreter on a machine
without a GPU, and torch's way on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from compare import check
from torch import Tensor

from flash_attn._rotary import batch_positions, rotate, varlen_positions
from flash_attn.backends import triton
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from flash_attn.ops.triton.rotary import apply_rotary

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(params=["torch", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device whose tensors go the way that the parameter names."""
    if request.param == "torch":
        return "cpu"
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "triton")
    device = "cuda" if HAS_GPU else "cpu"
    assert triton.serves(torch.zeros(1, device=device))
    return device


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MODULES = (
    "flash_attn.ops.triton.rotary",
    "flash_attn.layers.rotary",
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
