"""Blocks, embeddings and patches: what they compute, unfused and fused, and their names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problem_types import FP32, FP64
from torch import Tensor, nn

from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.modules.block import Block, ParallelBlock, StochasticDepth
from flash_attn.modules.embedding import BertEmbeddings, GPT2Embeddings, ParallelGPT2Embeddings
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm

DIM = 32
MIXER = partial(MHA, num_heads=2, causal=True, use_flash_attn=True)


def tokens(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, DIM, dtype=dtype)


def norm(x: Tensor, layer: Any) -> Tensor:
    if isinstance(layer, nn.LayerNorm):
        return nn.functional.layer_norm(x, (DIM,), layer.weight, layer.bias, layer.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.eps) * layer.weight


@pytest.mark.parametrize("has_mlp", [True, False])
@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("fused", [True, False])
def test_a_block_with_norms_in_front(fused: bool, norm_cls: Any, has_mlp: bool) -> None:
    mlp = {} if has_mlp else {"mlp_cls": nn.Identity}
    block = Block(DIM, MIXER, norm_cls=norm_cls, fused_dropout_add_ln=fused, **mlp).eval()
    x, residual = tokens(2, 7), tokens(2, 7)
    total = x + residual
    expected = block.mixer(norm(total, block.norm1))
    if has_mlp:
        total = total + expected
        expected = block.mlp(norm(total, block.norm2))
    out, kept = block(x, residual)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(kept, total, atol=1e-5)
    first, kept = block(x)
    assert torch.allclose(
        kept, x if not has_mlp else x + block.mixer(norm(x, block.norm1)), atol=1e-5
    )
    assert first.shape == x.shape


@pytest.mark.parametrize("return_residual", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_block_with_norms_behind(fused: bool, return_residual: bool) -> None:
    mixer = partial(MIXER, return_residual=return_residual)
    options = {"fused_dropout_add_ln": fused, "return_residual": return_residual}
    if return_residual:
        options["mlp_cls"] = partial(Mlp, return_residual=True)
    block = Block(DIM, mixer, prenorm=False, **options).eval()
    x = tokens(2, 7)

    def result(part: Any, y: Tensor) -> Tensor:
        return part(y)[0] if return_residual else part(y)

    y = norm(result(block.mixer, x) + x, block.norm1)
    expected = norm(result(block.mlp, y) + y, block.norm2)
    assert torch.allclose(block(x), expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_parallel_block(fused: bool, tied: bool) -> None:
    block = ParallelBlock(DIM, MIXER, tied_norm=tied, fused_dropout_add_ln=fused).eval()
    if not tied:
        nn.init.normal_(block.norm2.weight)
    x, y, residual = tokens(2, 7), tokens(2, 7), tokens(2, 7)
    for inputs, total in (((x,), x), ((x, y), x + y), ((x, y, residual), x + y + residual)):
        mixed, fed, kept = block(*inputs)
        assert torch.allclose(kept, total, atol=1e-5)
        assert torch.allclose(mixed, block.mixer(norm(total, block.norm1)), atol=1e-5)
        second = block.norm1 if tied else block.norm2
        assert torch.allclose(fed, block.mlp(norm(total, second)), atol=1e-5)


def test_a_subset_goes_on_behind_the_mixer() -> None:
    block = Block(DIM, partial(MHA, num_heads=2, cross_attn=True, use_flash_attn=True)).eval()
    x = tokens(2, 7)
    whole, kept = block(x)
    part, kept_part = block(x, mixer_subset=slice(0, 2))
    assert torch.allclose(part, whole[:, :2], atol=1e-5)
    assert torch.allclose(kept_part, kept[:, :2], atol=1e-5)


def test_options_of_residuals_and_marks() -> None:
    block = Block(DIM, MIXER, residual_in_fp32=True, sequence_parallel=True).to(torch.bfloat16)
    out, kept = block(tokens(1, 3, dtype=torch.bfloat16))
    assert (out.dtype, kept.dtype) == (torch.bfloat16, FP32)
    assert all(p._sequence_parallel for n in (block.norm1, block.norm2) for p in n.parameters())
    marked = ParallelBlock(DIM, MIXER, mark_shared_params=True)
    assert marked.norm1.weight._shared_params
    names = set(block.state_dict())
    assert {"mixer.Wqkv.weight", "norm1.weight", "mlp.fc1.weight", "norm2.bias"} <= names
    cache = block.allocate_inference_cache(2, 9)
    assert cache.shape == (2, 9, 2, 2, 16)


@pytest.mark.parametrize("fused", [True, False])
def test_dropped_paths_leave_the_residual(fused: bool) -> None:
    """With drop_path 1 nothing but the residual comes through, in training alone."""
    block = Block(DIM, MIXER, drop_path1=1.0, drop_path2=1.0, fused_dropout_add_ln=fused)
    x, residual = tokens(3, 4), tokens(3, 4)
    out, kept = block(x, residual)
    assert torch.equal(kept, residual)
    assert torch.allclose(out, block.mlp(norm(residual, block.norm2)), atol=1e-5)
    assert not torch.equal(block.eval()(x, residual)[1], residual)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_drops_rows_and_scales_the_rest(mode: str) -> None:
    layer = StochasticDepth(0.25, mode)
    torch.manual_seed(0)
    factors = torch.stack([layer(torch.ones(1000, 3)) for _ in range(20)])
    assert set(factors.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(factors[..., 0], factors[..., 2])
    assert bool((factors[:, :1] == factors).all()) == (mode == "batch")
    if mode == "row":
        assert abs(factors.mean().item() - 1) < 0.02


BAD: dict[str, tuple[Any, str]] = {
    "fp32 behind": (partial(Block, prenorm=False, residual_in_fp32=True), "residual_in_fp32"),
    "fused norm": (
        partial(Block, norm_cls=lambda n: nn.Identity(), fused_dropout_add_ln=True),
        "got Identity",
    ),
    "two dropouts": (
        partial(ParallelBlock, resid_dropout1=0.1, fused_dropout_add_ln=True),
        "got 0.1 and 0.0",
    ),
    "depth": (partial(Block, drop_path1=1.5), "got p 1.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_options_are_told(name: str) -> None:
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make(DIM, MIXER)


def test_what_goes_with_norms_in_front_is_told() -> None:
    block = Block(DIM, MIXER, prenorm=False)
    for argument in ({"residual": tokens(1, 2)}, {"mixer_subset": slice(0, 1)}):
        with pytest.raises(ValueError, match=f"Block: {next(iter(argument))} goes with prenorm"):
            block(tokens(1, 2), **argument)


def test_embeddings_are_sums_of_rows() -> None:
    ids, kinds = torch.randint(9, (2, 5)), torch.randint(2, (2, 5))
    gpt = GPT2Embeddings(8, 9, 6, word_embed_proj_dim=4, dtype=FP64)
    words = gpt.word_embeddings.weight[ids] @ gpt.project_in.weight.T
    assert torch.allclose(gpt(ids), words + gpt.position_embeddings.weight[:5])
    places = torch.tensor([[3, 4, 5, 0, 1]])
    assert torch.allclose(gpt(ids, places), words + gpt.position_embeddings.weight[places])
    bert = BertEmbeddings(8, 9, 6, 2, dtype=FP64)
    rows = bert.word_embeddings.weight[ids] + bert.position_embeddings.weight[:5]
    types = bert.token_type_embeddings.weight
    assert torch.allclose(bert(ids, token_type_ids=kinds), rows + types[kinds])
    assert torch.allclose(bert(ids), rows + types[0])
    bare = BertEmbeddings(8, 9, 0, 0)
    assert set(bare.state_dict()) == {"word_embeddings.weight"}
    assert torch.equal(bare(ids), bare.word_embeddings.weight[ids])


def _embed_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = GPT2Embeddings(8, 10, 6)
    ids = torch.randint(10, (2, 6))
    for sequence_parallel in (True, False):
        spread = ParallelGPT2Embeddings(
            8, 10, 6, dist.group.WORLD, sequence_parallel=sequence_parallel
        )
        with torch.no_grad():
            spread.word_embeddings.weight.copy_(whole.word_embeddings.weight.chunk(2)[rank])
            columns = whole.position_embeddings.weight.chunk(2, dim=1)[rank]
            spread.position_embeddings.weight.copy_(columns)
        got, expected = spread(ids, combine_batch_seqlen_dim=True), whole(ids).flatten(0, 1)
        assert torch.allclose(got, expected.chunk(2)[rank] if sequence_parallel else expected)
    with pytest.raises(ValueError, match="num_embeddings is 9; the 2 ranks"):
        ParallelGPT2Embeddings(8, 9, 6, dist.group.WORLD)
    dist.destroy_process_group()


def test_embeddings_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_embed_on_a_rank, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    alone = ParallelGPT2Embeddings(8, 10, 6, None)
    ids = torch.randint(10, (2, 6))
    rows = alone.word_embeddings.weight[ids] + alone.position_embeddings.weight
    assert torch.allclose(alone(ids), rows)


@pytest.mark.parametrize("flatten", [True, False])
def test_patches_are_what_a_convolution_sees(flatten: bool) -> None:
    layer = PatchEmbed((8, 12), 4, 3, 10, norm_layer=nn.LayerNorm, flatten=flatten)
    x = torch.randn(2, 3, 8, 12)
    kernel = layer.proj.weight.view(10, 3, 4, 4)
    seen = nn.functional.conv2d(x, kernel, layer.proj.bias, stride=4).permute(0, 2, 3, 1)
    expected = layer.norm(seen.flatten(1, 2) if flatten else seen)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert (layer.grid_size, layer.num_patches) == ((2, 3), 6)


def test_patches_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="patch_size must divide img_size; got 16, 40"):
        PatchEmbed(40)
    with pytest.raises(ValueError, match=r"height and width \(32, 32\)"):
        PatchEmbed(32)(torch.zeros(1, 3, 32, 16))
