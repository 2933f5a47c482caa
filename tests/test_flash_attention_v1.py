"""The module classes of FlashAttention 1."""

from __future__ import annotations

import pytest
import torch
from compare import check
from oracle import attention
from torch import Tensor

from flash_attn.flash_attention import FlashAttention, FlashMHA

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [5, 7, 0]
MASK = torch.arange(7) < torch.tensor(LENGTHS).unsqueeze(-1)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(dtype)


def oracle(qkv: Tensor, causal: bool, scale: float | None, dtype: torch.dtype) -> Tensor:
    q, k, v = qkv.to(dtype).unbind(2)
    return attention(q, k, v, causal=causal, softmax_scale=scale, dtype=dtype)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_padded_batch(dtype: torch.dtype, causal: bool) -> None:
    qkv = randn(3, 7, 3, 2, 16, dtype=dtype)
    out, weights = FlashAttention(softmax_scale=0.3)(qkv, causal=causal)
    assert weights is None
    exact, low = (oracle(qkv, causal, 0.3, d) for d in (torch.float64, dtype))
    check("out", out, exact, low)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_mask_equals_each_sequence_alone(causal: bool) -> None:
    qkv, attend = randn(3, 7, 3, 2, 16).requires_grad_(), FlashAttention()
    out, _ = attend(qkv, key_padding_mask=MASK, causal=causal)
    (gradient,) = torch.autograd.grad(out, qkv, randn(*out.shape))
    for i, n in enumerate(LENGTHS):
        alone = qkv[i : i + 1, :n].detach().requires_grad_()
        expected, _ = attend(alone, causal=causal)
        torch.testing.assert_close(out[i : i + 1, :n], expected)
        (alone_gradient,) = torch.autograd.grad(expected, alone, randn(*out.shape)[i : i + 1, :n])
        torch.testing.assert_close(gradient[i : i + 1, :n], alone_gradient)
    assert torch.equal(out[~MASK], torch.zeros_like(out[~MASK]))
    assert torch.equal(gradient[~MASK], torch.zeros_like(gradient[~MASK]))


def test_packed_sequences_equal_the_mask() -> None:
    qkv, attend = randn(3, 7, 3, 2, 16), FlashAttention()
    cu_seqlens = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
    packed, weights = attend(qkv[MASK], causal=True, cu_seqlens=cu_seqlens, max_s=7)
    assert weights is None
    padded, _ = attend(qkv, key_padding_mask=MASK, causal=True)
    assert torch.equal(packed, padded[MASK])


def test_dropout_acts_while_training_only() -> None:
    qkv, attend = randn(1, 16, 3, 2, 16), FlashAttention(attention_dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(attend(qkv)[0], attend(qkv)[0])
    attend.eval()
    assert torch.equal(attend(qkv)[0], FlashAttention()(qkv)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_mha_projects_attends_and_projects(bias: bool) -> None:
    torch.manual_seed(0)
    module = FlashMHA(32, 2, bias=bias, causal=True)
    x = randn(3, 7, 32)
    out, weights = module(x, key_padding_mask=MASK)
    assert weights is None
    qkv = module.Wqkv(x).reshape(3, 7, 3, 2, 16)
    context, _ = FlashAttention()(qkv, key_padding_mask=MASK, causal=True)
    assert torch.equal(out, module.out_proj(context.reshape(3, 7, 32)))
    names = {"Wqkv.weight", "out_proj.weight"} | ({"Wqkv.bias", "out_proj.bias"} if bias else set())
    assert set(module.state_dict()) == names
    assert FlashMHA(32, 2, attention_dropout=0.25).inner_attn.dropout_p == 0.25
    assert FlashMHA(32, 2, dtype=torch.bfloat16)(x.bfloat16())[0].dtype == torch.bfloat16


def test_rejected_arguments() -> None:
    qkv, attend = randn(3, 7, 3, 2, 16), FlashAttention()
    cu_seqlens = torch.tensor([0, 7, 14, 21], dtype=torch.int32)
    packed = qkv.flatten(0, 1)
    with pytest.raises(ValueError, match="FlashAttention: need_weights is True"):
        attend(qkv, need_weights=True)
    with pytest.raises(ValueError, match=r"qkv has shape \(21, 3, 2, 16\).* \(b, s, 3, h, d\)"):
        attend(packed)
    with pytest.raises(ValueError, match=r"it must be \(nnz, 3, h, d\) with cu_seqlens"):
        attend(qkv, cu_seqlens=cu_seqlens, max_s=7)
    with pytest.raises(ValueError, match="max_s is None"):
        attend(packed, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="key_padding_mask is a tensor"):
        attend(packed, MASK, cu_seqlens=cu_seqlens, max_s=7)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        attend(qkv, MASK[:, :3])
    with pytest.raises(ValueError, match="FlashMHA: need_weights is True"):
        FlashMHA(32, 2)(randn(3, 7, 32), need_weights=True)
    with pytest.raises(ValueError, match="FlashMHA: batch_first is False"):
        FlashMHA(32, 2, batch_first=False)
    with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads"):
        FlashMHA(33, 2)
