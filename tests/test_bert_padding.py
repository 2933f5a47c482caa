"""Padded batches to packed sequences and back, with gradients."""

from __future__ import annotations

import einops
import pytest
import torch
from small_calls import compiles
from torch import Tensor

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

LENGTHS = [
    pytest.param([5, 3, 1], id="ragged"),
    pytest.param([5, 5], id="full"),
    pytest.param([0, 4, 0], id="empty-sequences"),
    pytest.param([0, 0], id="all-empty"),
]


def prefix_mask(lengths: list[int], s: int = 5) -> Tensor:
    return torch.arange(s) < torch.tensor(lengths).unsqueeze(-1)


def hidden(b: int, s: int = 5, *rest: int) -> Tensor:
    generator = torch.Generator().manual_seed(b * 100 + s)
    return torch.randn(b, s, *rest, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rest", [(), (4,), (2, 3)], ids=["flat", "hidden", "heads"])
def test_pad_undoes_unpad(lengths: list[int], rest: tuple[int, ...]) -> None:
    b, mask = len(lengths), prefix_mask(lengths)
    x = hidden(b, 5, *rest)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    assert packed.shape == (sum(lengths), *rest)
    assert torch.equal(packed, x[mask])
    assert indices.dtype == torch.int64
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(b + 1)]
    assert seqused.tolist() == lengths
    assert type(max_seqlen) is int
    assert max_seqlen == max(lengths)
    padded = pad_input(packed, indices, b, 5)
    assert torch.equal(padded, x * mask.reshape(b, 5, *[1] * len(rest)))


def test_an_empty_batch_has_no_tokens() -> None:
    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden(0, 5, 4), prefix_mask([]))
    assert packed.shape == (0, 4)
    assert cu_seqlens.tolist() == [0]
    assert max_seqlen == 0
    assert pad_input(packed, indices, 0, 5).shape == (0, 5, 4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_left_padding_and_every_mask_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=dtype)
    x = hidden(2, 4, 3)
    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, mask)
    assert indices.tolist() == [2, 3, 4, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 2, 6]
    assert max_seqlen == 4
    assert torch.equal(packed, x.flatten(0, 1)[indices])


def test_unused_tokens_get_a_place_but_do_not_count_as_used() -> None:
    used, reserved = prefix_mask([2, 3]), prefix_mask([4, 3]) ^ prefix_mask([2, 3])
    x = hidden(2, 5, 3)
    packed, _, cu_seqlens, max_seqlen, seqused = unpad_input(x, used, reserved)
    assert torch.equal(packed, x[prefix_mask([4, 3])])
    assert cu_seqlens.tolist() == [0, 4, 7]
    assert max_seqlen == 4
    assert seqused.tolist() == [2, 3]


def test_concatenated_sequences_have_their_own_boundaries() -> None:
    mask = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = hidden(3, 6, 4)
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, mask)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert cu_seqlens.dtype == torch.int32
    assert max_seqlen == 6
    assert torch.equal(packed, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert torch.equal(pad_input(packed, indices, 3, 6)[:2, 5:], torch.zeros(2, 1, 4).double())


def test_gradients_flow_only_to_chosen_tokens() -> None:
    mask = prefix_mask([2, 5])
    x = hidden(2, 5, 3).requires_grad_()
    packed, indices, *_ = unpad_input(x, mask)
    pad_input(packed * 2, indices, 2, 5).sum().backward()
    assert torch.equal(x.grad, 2.0 * mask.unsqueeze(-1).expand_as(x))


def test_gradcheck_of_every_index_function() -> None:
    x = hidden(1, 6, 2)[0].requires_grad_()
    rows = hidden(1, 4, 2)[0].requires_grad_()
    repeated, distinct = torch.tensor([4, 0, 4, 5]), torch.tensor([4, 0, 2, 5])
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(index_first_axis, (x, repeated))
        assert check(index_put_first_axis, (rows, distinct, 7))
        assert check(index_first_axis_residual, (x, repeated))


def test_residual_returns_the_rows_and_the_input() -> None:
    x = hidden(1, 6, 2)[0]
    rows, residual = index_first_axis_residual(x, torch.tensor([1, 3]))
    assert torch.equal(rows, x[[1, 3]])
    assert torch.equal(residual, x)


@compiles
def test_index_functions_compile_into_one_graph() -> None:
    def through(x: Tensor, indices: Tensor) -> Tensor:
        return index_put_first_axis(index_first_axis(x, indices) * 3, indices, 6)

    indices = torch.tensor([4, 0, 2])
    grads = []
    for function in (through, torch.compile(through, fullgraph=True, backend="aot_eager")):
        x = hidden(1, 6, 2)[0].requires_grad_()
        function(x, indices).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_einops_names_are_importable_from_here() -> None:
    assert bert_padding.rearrange is einops.rearrange
    assert bert_padding.repeat is einops.repeat


def test_masks_and_indices_of_another_shape_are_rejected() -> None:
    x, mask = hidden(2, 5, 3), prefix_mask([2, 3])
    with pytest.raises(ValueError, match=r"unpad_input: attention_mask has shape \(2, 4\)"):
        unpad_input(x, mask[:, :4])
    with pytest.raises(ValueError, match=r"unpad_input: unused_mask has shape \(1, 5\)"):
        unpad_input(x, mask, mask[:1])
    with pytest.raises(ValueError, match="attention_mask_in_length has shape"):
        unpad_input_for_concatenated_sequences(x, mask[:1].long())
    with pytest.raises(ValueError, match=r"index_first_axis: indices has shape \(1, 2\)"):
        index_first_axis(x, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"index_put_first_axis: indices has shape \(1, 2\)"):
        index_put_first_axis(x, torch.tensor([[0, 1]]), 4)
    for indices in (torch.tensor([0, 6]), torch.tensor([0, -1]), torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match=r"^pad_input: indices must be 2 rows of the 2 \* 3"):
            pad_input(torch.ones(2, 4), indices, 2, 3)
