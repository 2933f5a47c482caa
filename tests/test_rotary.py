"""Rotary embeddings against complex multiplication in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_calls import compiles
from torch import Tensor

from flash_attn._rotary import rotate, varlen_positions
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)

PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tables(seqlen: int, rotary_dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    angles = randn(seqlen, rotary_dim // 2, seed=7) * 3
    return [angles.cos().to(dtype), angles.sin().to(dtype)]


def oracle(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Each pair as a complex number times e^(i angle); x (..., s, h, d), positions (..., s)."""
    x, r = x.double(), 2 * cos.shape[-1]
    even = torch.arange(0, r, 2) if interleaved else torch.arange(r // 2)
    odd = even + (1 if interleaved else r // 2)
    turn = torch.complex(cos.double(), sin.double())[positions].unsqueeze(-2)
    turned = torch.complex(x[..., even], x[..., odd]) * turn
    out = x.clone()
    out[..., even], out[..., odd] = turned.real, turned.imag
    return out


def rounding(dtype: torch.dtype) -> float:
    """Two roundings of the result's precision: the float32 maths adds far less than one."""
    return 2 * torch.finfo(dtype).eps


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    eps = rounding(actual.dtype)
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=eps, atol=eps * scale)


@PAIRINGS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [2, 8, 16])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_rotation_is_complex_multiplication(
    interleaved: bool, dtype: torch.dtype, rotary_dim: int, inplace: bool
) -> None:
    x = randn(2, 5, 3, 16, dtype=dtype)
    cos, sin = tables(9, rotary_dim, dtype)
    expected = oracle(x, cos, sin, torch.arange(3, 8), interleaved)
    before = x.clone()
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets=3)
    assert out.dtype == dtype
    assert_rounded(out, expected)
    assert (out is x) == inplace
    assert inplace or torch.equal(x, before)


@PAIRINGS
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64], ids=str)
def test_each_sequence_has_its_own_offset(interleaved: bool, offset_dtype: torch.dtype) -> None:
    x, (cos, sin) = randn(3, 4, 2, 8), tables(10, 8)
    offsets = torch.tensor([0, 6, 2], dtype=offset_dtype)
    positions = offsets.unsqueeze(-1) + torch.arange(4)
    out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    assert_rounded(out, oracle(x, cos, sin, positions, interleaved))


@PAIRINGS
@pytest.mark.parametrize("offsets", [0, 2, torch.tensor([1, 3, 0, 2])], ids=["0", "2", "tensor"])
def test_packed_sequences_restart_at_each_boundary(
    interleaved: bool, offsets: int | Tensor
) -> None:
    lengths = [3, 0, 5, 1]
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    x, (cos, sin) = randn(9, 2, 8), tables(9, 8)
    out = apply_rotary_emb(
        x, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=5
    )
    for i, rows in enumerate(torch.arange(9).split(lengths)):
        start = offsets if isinstance(offsets, int) else int(offsets[i])
        expected = oracle(x[rows], cos, sin, torch.arange(len(rows)) + start, interleaved)
        assert_rounded(out[rows], expected)


def test_tokens_outside_the_boundaries_have_a_position_in_the_table() -> None:
    assert varlen_positions(5, torch.tensor([0, 1, 3]), 4).tolist() == [4, 4, 5, 0, 0]
    assert varlen_positions(5, torch.tensor([2, 4]), 4).tolist() == [0, 0, 4, 5, 0]
    assert varlen_positions(2, torch.tensor([0])).tolist() == [0, 0]
    assert varlen_positions(0, torch.tensor([0, 0])).tolist() == []


@PAIRINGS
def test_conjugate_undoes_the_rotation(interleaved: bool) -> None:
    x, (cos, sin), positions = randn(2, 5, 3, 10), tables(5, 8), torch.arange(5)
    turned = rotate(x, cos, sin, positions, interleaved)
    assert_rounded(rotate(turned, cos, sin, positions, interleaved, conjugate=True), x)


@PAIRINGS
@pytest.mark.parametrize("varlen", [False, True], ids=["padded", "varlen"])
def test_gradients_of_the_rotation(interleaved: bool, varlen: bool) -> None:
    cos, sin = tables(6, 4)
    if varlen:
        x, extra = randn(4, 2, 6), {"cu_seqlens": torch.tensor([0, 1, 4]), "max_seqlen": 3}
    else:
        x, extra = randn(2, 3, 1, 6), {"seqlen_offsets": torch.tensor([3, 0])}

    def out_of_place(x: Tensor) -> Tensor:
        return apply_rotary_emb(x, cos, sin, interleaved, **extra)

    def in_place(x: Tensor) -> Tensor:
        return apply_rotary_emb(x.clone(), cos, sin, interleaved, inplace=True, **extra)

    x.requires_grad_()
    for function in (out_of_place, in_place):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@PAIRINGS
@pytest.mark.parametrize("xpos", [False, True], ids=["plain", "xpos"])
@pytest.mark.parametrize("layout", ["packed", "gqa"])
def test_qkv_is_rotated_in_place_but_for_v(interleaved: bool, xpos: bool, layout: str) -> None:
    (cos, sin), offsets = tables(8, 6), torch.tensor([4, 1])
    cos_k, sin_k = (cos * 2, sin * 2) if xpos else (cos, sin)
    packed = layout == "packed"
    qkv = randn(2, 3, 3, 2, 8) if packed else randn(2, 3, 4 + 2 * 2, 8)
    q, k, v = qkv.clone().unbind(2) if packed else qkv.clone().split([4, 2, 2], dim=2)
    out = apply_rotary_emb_qkv_(
        qkv,
        cos,
        sin,
        cos_k=cos_k if xpos else None,
        sin_k=sin_k if xpos else None,
        interleaved=interleaved,
        seqlen_offsets=offsets,
        num_heads_q=None if packed else 4,
    )
    assert out is qkv
    out_q, out_k, out_v = qkv.unbind(2) if packed else qkv.split([4, 2, 2], dim=2)
    positions = offsets.unsqueeze(-1) + torch.arange(3)
    assert_rounded(out_q, oracle(q, cos, sin, positions, interleaved))
    assert_rounded(out_k, oracle(k, cos_k, sin_k, positions, interleaved))
    assert torch.equal(out_v, v)


@PAIRINGS
def test_kv_is_rotated_in_place_but_for_v(interleaved: bool) -> None:
    kv, (cos, sin) = randn(2, 3, 2, 2, 8), tables(8, 8)
    k, v = kv.clone().unbind(2)
    assert apply_rotary_emb_kv_(kv, cos, sin, interleaved, 2) is kv
    assert_rounded(kv[:, :, 0], oracle(k, cos, sin, torch.arange(2, 5), interleaved))
    assert torch.equal(kv[:, :, 1], v)


def test_gradients_of_the_packed_forms() -> None:
    (cos, sin), offsets = tables(6, 4), torch.tensor([2, 0])

    def gqa(qkv: Tensor) -> Tensor:
        return apply_rotary_emb_qkv_(
            qkv.clone(), cos, sin, cos * 2, sin * 2, seqlen_offsets=offsets, num_heads_q=2
        )

    qkv, kv = randn(2, 2, 3, 1, 4).requires_grad_(), randn(2, 2, 2, 1, 4).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: apply_rotary_emb_qkv_(x.clone(), cos, sin), qkv)
    assert check(gqa, randn(2, 2, 4, 4).requires_grad_())
    assert check(lambda x: apply_rotary_emb_kv_(x.clone(), cos, sin), kv)


UNWRITABLE = {
    "leaf": lambda x: x,
    "view of a leaf": lambda x: x[:1],
    "unbind": lambda x: (x * 2).unbind(0)[1][None],
    "split": lambda x: (x * 2).split(1)[1],
}


@pytest.mark.parametrize("view", UNWRITABLE.values(), ids=UNWRITABLE)
@pytest.mark.parametrize("form", ["one", "packed", "gqa", "kv"])
def test_what_autograd_lets_nobody_write_is_rotated_in_place(form: str, view: Any) -> None:
    """As published: its kernels write where autograd does not see it."""
    cos, sin = tables(6, 4)
    shape, turn = {
        "one": ((3, 2, 4), lambda x: apply_rotary_emb(x, cos, sin, inplace=True)),
        "packed": ((3, 3, 2, 4), lambda x: apply_rotary_emb_qkv_(x, cos, sin)),
        "gqa": ((3, 4, 4), lambda x: apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=2)),
        "kv": ((3, 2, 2, 4), lambda x: apply_rotary_emb_kv_(x, cos, sin)),
    }[form]
    results = []
    for given in (view, lambda x: view(x).clone()):
        leaf = randn(2, *shape).requires_grad_()
        x = given(leaf)
        out = turn(x)
        assert torch.equal(x, out)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    for got, expected in zip(*results):
        assert_rounded(got, expected)


def test_strided_views_are_rotated_in_place() -> None:
    cache, (cos, sin) = randn(2, 2, 6, 8), tables(6, 8)
    x = cache.transpose(1, 2)[:, ::2]
    assert not x.is_contiguous()
    untouched = cache[:, :, 1::2].clone()
    expected = oracle(x, cos, sin, torch.arange(3), False)
    apply_rotary_emb(x, cos, sin, inplace=True)
    assert_rounded(cache[:, :, ::2].transpose(1, 2), expected)
    assert torch.equal(cache[:, :, 1::2], untouched)


@PAIRINGS
def test_textbook_form_agrees(interleaved: bool) -> None:
    x, (cos, sin) = randn(2, 5, 3, 10), tables(5, 8)
    expected = oracle(x, cos, sin, torch.arange(5), interleaved)
    assert_rounded(apply_rotary_emb_torch(x, cos, sin, interleaved), expected)
    per_batch = [table.expand(2, 5, 4) for table in (cos, sin)]
    assert_rounded(apply_rotary_emb_torch(x, *per_batch, interleaved), expected)


def test_rotate_half_turns_pairs_by_a_right_angle() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rotate_half(x).tolist() == [-3, -4, 1, 2]
    assert rotate_half(x, interleaved=True).tolist() == [-2, 1, -4, 3]


def test_published_alias() -> None:
    assert apply_rotary_emb_func is apply_rotary_emb


@compiles
@pytest.mark.parametrize("varlen", [False, True], ids=["padded", "varlen"])
def test_compiled_in_one_graph_equals_eager(varlen: bool) -> None:
    cos, sin = tables(8, 8, torch.float32)
    extra = {"cu_seqlens": torch.tensor([0, 1, 6], dtype=torch.int32), "max_seqlen": 5}

    def function(x: Tensor) -> Tensor:
        y = apply_rotary_emb(x * 2, cos, sin, **(extra if varlen else {}))
        return apply_rotary_emb(y * 3, cos, sin, True, True, **(extra if varlen else {}))

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        x = randn(6, 2, 8, dtype=torch.float32) if varlen else randn(2, 4, 2, 8).float()
        x.requires_grad_()
        out = call(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for eager, compiled in zip(*results):
        assert_rounded(compiled, eager)


def exact_angles(seqlen: int, dim: int, base: float = 10000.0) -> Tensor:
    inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.arange(seqlen, dtype=torch.float64).outer(inv_freq)


@PAIRINGS
def test_module_rotates_by_position_times_frequency(interleaved: bool) -> None:
    rotary = RotaryEmbedding(8, base=100.0, interleaved=interleaved)
    qkv = randn(2, 5, 3, 2, 10, dtype=torch.float32)
    angles, before = exact_angles(8, 8, 100.0), qkv.clone()
    out = rotary(qkv, seqlen_offset=3)
    assert out is qkv
    expected = oracle(
        before[:, :, :2].transpose(2, 1),
        angles.cos(),
        angles.sin(),
        torch.arange(3, 8),
        interleaved,
    ).transpose(2, 1)
    # A float32 angle near 7 is off by up to 7 eps, and turns a value by that.
    atol = 8 * torch.finfo(torch.float32).eps * before.abs().max().item()
    torch.testing.assert_close(out[:, :, :2].double(), expected, rtol=0, atol=atol)
    assert torch.equal(out[:, :, 2], before[:, :, 2])


def test_module_takes_q_and_kv_apart_and_gqa_packed() -> None:
    rotary = RotaryEmbedding(8)
    q, kv = randn(2, 5, 4, 8).float(), randn(2, 5, 2, 2, 8, seed=1).float()
    packed = torch.cat([q, kv[:, :, 0], kv[:, :, 1]], dim=2)
    out_q, out_kv = rotary(q, kv)
    assert out_q is q
    assert out_kv is kv
    rotary(packed, num_heads_q=4)
    assert torch.equal(packed, torch.cat([q, kv[:, :, 0], kv[:, :, 1]], dim=2))


def test_module_with_tensor_offsets_needs_max_seqlen_once() -> None:
    rotary, offsets = RotaryEmbedding(8), torch.tensor([0, 3])
    qkv = randn(2, 1, 3, 1, 8).float()
    expected = torch.cat([rotary(qkv[i : i + 1].clone(), seqlen_offset=3 * i) for i in (0, 1)])
    fresh = RotaryEmbedding(8)
    with pytest.raises(ValueError, match="must give max_seqlen"):
        fresh(qkv.clone(), seqlen_offset=offsets)
    assert torch.equal(fresh(qkv.clone(), seqlen_offset=offsets, max_seqlen=4), expected)
    assert torch.equal(fresh(qkv.clone(), seqlen_offset=offsets), expected)


def test_tables_grow_and_follow_dtype_and_are_otherwise_kept() -> None:
    rotary = RotaryEmbedding(8)
    rotary._update_cos_sin_cache(4)
    first = rotary._cos_cached
    assert first.shape == (4, 4)
    assert first.dtype == torch.float32
    rotary._update_cos_sin_cache(3)
    assert rotary._cos_cached is first
    rotary._update_cos_sin_cache(6, dtype=torch.bfloat16)
    assert rotary._cos_cached.shape == (6, 4)
    assert rotary._sin_cached.dtype == torch.bfloat16
    assert rotary._seq_len_cached == 6
    assert rotary._cos_k_cached is None


def test_tables_made_in_inference_mode_are_replaced_for_training() -> None:
    rotary = RotaryEmbedding(8)
    with torch.inference_mode():
        rotary(randn(1, 4, 3, 1, 8).float())
    x = randn(1, 4, 3, 1, 8).float().requires_grad_()
    rotary(x.clone()).sum().backward()
    assert x.grad is not None


def test_frequencies_stay_exact_in_a_bf16_module() -> None:
    rotary = RotaryEmbedding(64).to(torch.bfloat16)
    rotary._update_cos_sin_cache(4096, dtype=torch.float32)
    expected = exact_angles(4096, 64).cos()
    # float32 angles up to 4096 carry half a unit of 2^-12 from the product and one from inv_freq.
    torch.testing.assert_close(rotary._cos_cached.double(), expected, rtol=0, atol=2**-11)


def test_buffers_are_not_in_the_state_dict() -> None:
    assert list(RotaryEmbedding(8, scale_base=512.0).state_dict()) == []


def test_xpos_scores_depend_on_distance_only_and_decay() -> None:
    rotary = RotaryEmbedding(8, scale_base=4.0)
    q, kv = torch.ones(1, 12, 1, 8), torch.ones(1, 12, 2, 1, 8)
    rotary(q, kv)
    scores = q[0, :, 0] @ kv[0, :, 0, 0].T
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    decay = ((torch.arange(0, 8, 2) + 3.2) / 11.2) ** (5 / 4)
    expected = 2 * (decay * exact_angles(6, 8)[5].cos()).sum()
    torch.testing.assert_close(scores[7, 2].double(), expected)
    packed = torch.ones(1, 12, 3, 1, 8)
    rotary(packed)
    assert torch.equal(packed[:, :, 0], q)
    assert torch.equal(packed[:, :, 1], kv[:, :, 0])


@compiles
def test_module_compiled_in_one_graph_equals_eager() -> None:
    rotary = RotaryEmbedding(8)

    def function(x: Tensor) -> Tensor:
        return rotary(x * 2)

    x = randn(2, 4, 3, 2, 8).float()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_rounded(compiled(x), function(x))


def packed(*boundaries: float) -> dict:
    return {"x": (5, 3, 8), "cu_seqlens": torch.tensor(boundaries), "max_seqlen": 3}


REJECTED = [
    ({"x": (2, 5, 8)}, ValueError, r"x has shape \(2, 5, 8\); it must be \(b, s, h, d\)"),
    ({"cos": (9, 5)}, ValueError, "cos has shape .* both must be"),
    ({"cos": (9, 6), "sin": (9, 6)}, ValueError, "rotary_dim must be <= headdim"),
    ({"seqlen_offsets": 5}, ValueError, "seqlen_ro must be >= seqlen"),
    ({"seqlen_offsets": -1}, ValueError, "seqlen_offsets is -1"),
    ({"seqlen_offsets": torch.zeros(3).int()}, ValueError, r"must be an int or \(2,\)"),
    ({"seqlen_offsets": torch.zeros(2)}, TypeError, "must be int32 or int64"),
    ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, "then max_seqlen must be passed"),
    (
        {"cu_seqlens": torch.tensor([0, 2]), "max_seqlen": 2},
        ValueError,
        r"with cu_seqlens it must be \(total, h, d\)",
    ),
    (
        {"seqlen_offsets": torch.tensor([0, -3])},
        ValueError,
        r"seqlen_offsets\[1\] is -3; it must lie between 0 and 4, the 9 positions of cos",
    ),
    ({"seqlen_offsets": torch.tensor([5, 0])}, ValueError, r"seqlen_offsets\[0\] is 5"),
    (packed(0, 3, 99), ValueError, r"cu_seqlens\[2\] is 99; it must lie between 3 and 5"),
    (packed(0, 4, 2, 5), ValueError, r"cu_seqlens\[2\] is 2; it must lie between 4 and 5"),
    (packed(0, 1, 5), ValueError, r"max_seqlen is 3, but the longest sequence has 4 rows"),
    (packed(0.0, 5.0), ValueError, r"cu_seqlens is torch.float32 of shape \(2,\); it must be"),
    (
        {**packed(0, 3, 5), "seqlen_offsets": torch.tensor([6, 8])},
        ValueError,
        r"seqlen_offsets\[1\] is 8; it must lie between 0 and 7",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REJECTED, ids=[r[2] for r in REJECTED])
def test_rejected_arguments(change: dict, error: type[Exception], message: str) -> None:
    shapes = {"x": (2, 5, 3, 8), "cos": (9, 4), "sin": (9, 4)}
    arguments = {name: randn(*change.get(name, shape)) for name, shape in shapes.items()}
    arguments |= {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(error, match="apply_rotary_emb: .*" + message):
        apply_rotary_emb(**arguments)


def test_rejected_packed_shapes() -> None:
    cos, sin = tables(9, 8)
    with pytest.raises(ValueError, match="apply_rotary_emb_qkv_: qkv has shape"):
        apply_rotary_emb_qkv_(randn(2, 5, 8, 8), cos, sin)
    with pytest.raises(ValueError, match="apply_rotary_emb_qkv_: qkv has shape"):
        apply_rotary_emb_qkv_(randn(2, 5, 2, 1, 8), cos, sin)
    with pytest.raises(ValueError, match="apply_rotary_emb_kv_: kv has shape"):
        apply_rotary_emb_kv_(randn(2, 5, 3, 1, 8), cos, sin)
    with pytest.raises(ValueError, match="dim is 7; it must be even"):
        RotaryEmbedding(7)
    for heads in (-2, 0, 8):
        with pytest.raises(ValueError, match=f"num_heads_q is {heads}; it must be"):
            apply_rotary_emb_qkv_(randn(2, 5, 6, 8), cos, sin, num_heads_q=heads)
