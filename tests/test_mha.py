"""The attention modules: fused against plain, packed against padded, cached against whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compare import check
from oracle import attention
from small_calls import compiles
from torch import Tensor, nn

import flash_attn
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.modules import mha
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashAttention,
    FlashAttention2,
    FlashCrossAttention,
    FlashMHA,
    FlashSelfAttention,
    SelfAttention,
    _update_kv_cache,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

EMBED = 64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def make(options: dict[str, Any], **more: Any) -> MHA:
    """A module whose weights depend on its options only by their shapes."""
    torch.manual_seed(0)
    return MHA(EMBED, 4, **options, **more)


def check_as(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """By the rule: at most twice the error of plain torch in the same precision."""
    check(name, got.detach(), exact.detach(), plain.detach())


# --- get_alibi_slopes ---


def test_alibi_slopes_of_the_paper() -> None:
    assert get_alibi_slopes(1) == [2**-8]
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(16) == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    between = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert get_alibi_slopes(12) == pytest.approx(get_alibi_slopes(8) + between)
    with pytest.raises(ValueError, match="get_alibi_slopes: nheads is 0"):
        get_alibi_slopes(0)


# --- modules around the functions ---


OPTIONS: dict[str, Any] = {"softmax_scale": 0.3, "window_size": (3, 1), "deterministic": True}
SLOPES = torch.tensor([0.5, 0.25])
CU = torch.tensor([0, 2, 7], dtype=torch.int32)


def test_flash_modules_pass_their_options_on() -> None:
    qkv = randn(7, 3, 2, 8)
    q, k, v = qkv.unbind(1)
    lengths = {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 5, "max_seqlen_k": 5}
    for causal in (True, False):
        module = FlashSelfAttention(causal, alibi_slopes=SLOPES, **OPTIONS)
        cross = FlashCrossAttention(causal, alibi_slopes=SLOPES, **OPTIONS)
        separate = FlashAttention2(causal, alibi_slopes=SLOPES, softcap=2.0, **OPTIONS)
        options = {"causal": causal, "alibi_slopes": SLOPES, **OPTIONS}
        expected = flash_attn.flash_attn_varlen_func(q, k, v, **lengths, **options)
        capped = flash_attn.flash_attn_varlen_func(q, k, v, **lengths, softcap=2.0, **options)
        assert torch.equal(module(qkv, cu_seqlens=CU, max_seqlen=5), expected)
        assert torch.equal(cross(q, qkv[:, 1:], None, CU, 5, CU, 5), expected)
        assert torch.equal(separate(q, k, v, None, CU, CU, 5, 5), capped)

        expected = flash_attn.flash_attn_func(q[None], k[None], v[None], **options)
        capped = flash_attn.flash_attn_func(q[None], k[None], v[None], softcap=2.0, **options)
        assert torch.equal(module(qkv[None]), expected)
        assert torch.equal(cross(q[None], qkv[None, :, 1:]), expected)
        assert torch.equal(separate(q[None], k[None], v[None]), capped)
        # The argument of the call wins over the constructor's.
        flipped = flash_attn.flash_attn_func(
            q[None], k[None], v[None], **{**options, "causal": not causal}
        )
        assert torch.equal(module(qkv[None], causal=not causal), flipped)
        assert torch.equal(cross(q[None], qkv[None, :, 1:], causal=not causal), flipped)


@pytest.mark.parametrize("make_module", [FlashSelfAttention, SelfAttention])
def test_dropout_acts_while_training_only(make_module: type[nn.Module]) -> None:
    module, qkv = make_module(attention_dropout=0.5), randn(1, 16, 3, 2, 8)
    torch.manual_seed(1)
    assert not torch.equal(module(qkv), module(qkv))
    module.eval()
    assert torch.equal(module(qkv), make_module()(qkv))


def test_flash_attention_plus_class() -> None:
    q, k, v = randn(2, 5, 4, 8), randn(2, 6, 2, 8, seed=1), randn(2, 6, 2, 8, seed=2)
    slopes = torch.tensor(get_alibi_slopes(4))
    module = FlashAttention(4, 8, causal=True, window_size=(2, -1), alibi_slopes=slopes)
    module.reset_parameters()
    expected = flash_attn.flash_attn_func(
        q, k, v, causal=True, window_size=(2, -1), alibi_slopes=slopes
    )
    assert torch.equal(module(q, k, v), expected)
    assert FlashAttention(4, 8, dropout=0.25).drop.p == 0.25
    with pytest.raises(ValueError, match=r"q has shape .* must be \(b, sq, 8, 4\)"):
        FlashAttention(8, 4)(q, k, v)


def test_missing_lengths_of_packed_sequences_are_named() -> None:
    qkv = randn(7, 3, 2, 8)
    q, k, v = qkv.unbind(1)
    with pytest.raises(ValueError, match="FlashSelfAttention: max_seqlen is None"):
        FlashSelfAttention()(qkv, cu_seqlens=CU)
    with pytest.raises(ValueError, match="FlashCrossAttention: cu_seqlens_k, max_seqlen_k is None"):
        FlashCrossAttention()(q, qkv[:, 1:], cu_seqlens=CU, max_seqlen=5)
    with pytest.raises(ValueError, match="FlashAttention2: max_seqlen_k is None"):
        FlashAttention2()(q, k, v, cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=5)


def test_casting_a_module_keeps_the_slopes_in_float32() -> None:
    module = make({"use_alibi": True, "use_flash_attn": True}).to(torch.bfloat16)
    assert module.Wqkv.weight.dtype == torch.bfloat16
    for inner in (module.inner_attn, module.inner_cross_attn):
        assert inner.alibi_slopes.dtype == torch.float32
        assert inner.alibi_slopes.tolist() == get_alibi_slopes(4)
    assert module(randn(1, 3, EMBED, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- attention in plain torch ---


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("hk", [4, 2, 1])
def test_plain_cross_attention_is_attention(causal: bool, hk: int) -> None:
    q, kv = randn(2, 5, 4, 8), randn(2, 7, 2, hk, 8, seed=1)
    options = {"softmax_scale": 0.3, "causal": causal}
    out = CrossAttention(causal, 0.3)(q, kv)
    exact, low = (
        attention(q.to(dtype), *kv.to(dtype).unbind(2), dtype=dtype, **options)[0]
        for dtype in (torch.float64, torch.float32)
    )
    check("out", out, exact, low)


def test_plain_self_attention_leaves_padded_keys_out() -> None:
    qkv, mask = randn(2, 6, 3, 2, 8), torch.arange(6) < torch.tensor([[6], [4]])
    for causal in (False, True):
        out = SelfAttention(causal)(qkv, key_padding_mask=mask)
        short = SelfAttention(causal)(qkv[1:, :4])
        torch.testing.assert_close(out[:1], SelfAttention(causal)(qkv[:1]))
        torch.testing.assert_close(out[1:, :4], short)


def test_causal_cross_attention_is_aligned_to_the_last_key_that_is_there() -> None:
    q, kv, lengths = randn(3, 4, 4, 8), randn(3, 7, 2, 2, 8, seed=1), [7, 6, 4]
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(-1)
    out = CrossAttention(causal=True)(q, kv, key_padding_mask=mask)
    for i, length in enumerate(lengths):
        short = CrossAttention(causal=True)(q[i : i + 1], kv[i : i + 1, :length])
        torch.testing.assert_close(out[i : i + 1], short)


def test_plain_attention_rejects_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(6,\)"):
        SelfAttention()(randn(2, 6, 3, 2, 8), key_padding_mask=torch.ones(6).bool())
    with pytest.raises(ValueError, match="CrossAttention: q has 3 heads, kv has 2"):
        CrossAttention()(randn(2, 6, 3, 8), randn(2, 6, 2, 2, 8))
    for kv in (randn(1, 6, 2, 2, 8), randn(2, 6, 2, 2, 4), randn(2, 6, 3, 2, 8), randn(2, 6, 2, 8)):
        with pytest.raises(ValueError, match=r"CrossAttention: q has shape \(2, 6, 4, 8\), kv \("):
            CrossAttention()(randn(2, 6, 4, 8), kv)
    for qkv in (randn(2, 6, 2, 8), randn(2, 6, 2, 2, 8)):
        with pytest.raises(ValueError, match="SelfAttention: qkv has shape"):
            SelfAttention()(qkv)


# --- MHA: with the functions as without ---

SAME: dict[str, dict[str, Any]] = {
    "default": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.4, "causal": True},
    "gqa": {"num_heads_kv": 2, "causal": True},
    "mqa": {"num_heads_kv": 1},
    "cross": {"cross_attn": True},
    "cross-gqa": {"cross_attn": True, "num_heads_kv": 2},
    "rotary": {"rotary_emb_dim": 16, "causal": True},
    "rotary-interleaved": {"rotary_emb_dim": 16, "rotary_emb_interleaved": True},
    "rotary-partial-gqa": {"rotary_emb_dim": 6, "num_heads_kv": 2},
    "xpos": {"rotary_emb_dim": 16, "rotary_emb_scale_base": 64.0, "causal": True},
    "dwconv": {"dwconv": True, "causal": True},
    "dwconv-gqa": {"dwconv": True, "num_heads_kv": 2},
    "dwconv-cross": {"dwconv": True, "cross_attn": True},
    "no-bias": {"qkv_proj_bias": False, "out_proj_bias": False},
    "checkpointing": {"checkpointing": True, "causal": True},
    "checkpointing-gqa": {"checkpointing": True, "num_heads_kv": 2},
}


def forward_backward(module: MHA, x: Tensor, x_kv: Tensor | None) -> list[tuple[str, Tensor]]:
    inputs = [x.clone().requires_grad_()]
    if x_kv is not None:
        inputs.append(x_kv.clone().requires_grad_())
    out = module(*inputs)
    leaves = [*inputs, *module.parameters()]
    names = ["dx", "dx_kv"][: len(inputs)] + [f"d{name}" for name, _ in module.named_parameters()]
    gradients = torch.autograd.grad(out, leaves, randn(*out.shape, seed=9, dtype=out.dtype))
    return [("out", out), *zip(names, gradients)]


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_flash_and_plain_agree(options: dict[str, Any]) -> None:
    flash, plain = (make(options, use_flash_attn=use) for use in (True, False))
    flash.load_state_dict(plain.state_dict())
    x = randn(2, 9, EMBED)
    x_kv = randn(2, 11, EMBED, seed=1) if options.get("cross_attn") else None
    exact = copy.deepcopy(plain).double()
    reference = forward_backward(exact, x.double(), None if x_kv is None else x_kv.double())
    runs = (forward_backward(module, x, x_kv) for module in (flash, plain))
    for (name, got), (_, low), (_, true) in zip(*runs, reference):
        check_as(name, got, low, true)


def test_state_dict_names_are_the_published_ones() -> None:
    def names(**options: Any) -> set[str]:
        return {name.rpartition(".")[0] for name in make(options).state_dict()}

    assert names(rotary_emb_dim=16) == {"Wqkv", "out_proj"}
    assert names(cross_attn=True) == {"Wq", "Wkv", "out_proj"}
    assert names(dwconv=True) == {"Wqkv", "dwconv_qkv", "out_proj"}
    assert names(dwconv=True, num_heads_kv=2) == {"Wqkv", "dwconv_q", "dwconv_kv", "out_proj"}
    module = make({"rotary_emb_dim": 16, "num_heads_kv": 2})
    assert module.Wqkv.weight.shape == (EMBED + 2 * 2 * 16, EMBED)
    assert next(module.rotary_emb.buffers()).shape == (8,)


def test_residual_is_the_input() -> None:
    x = randn(2, 5, EMBED)
    out, residual = make({"return_residual": True})(x)
    assert residual is x
    assert torch.equal(out, make({})(x))


@pytest.mark.parametrize("options", [{}, {"num_heads_kv": 2}, {"cross_attn": True}], ids=str)
@pytest.mark.parametrize("use_flash_attn", [False, True])
def test_options_of_a_call_go_to_the_attention(
    options: dict[str, Any], use_flash_attn: bool
) -> None:
    full, causal = (make({**options, "causal": x}, use_flash_attn=use_flash_attn) for x in (0, 1))
    full, causal, x = full.eval(), causal.eval(), randn(2, 5, EMBED)
    assert torch.equal(full(x, causal=True), causal(x))
    with pytest.raises(TypeError, match="no_such_option"):
        full(x, no_such_option=True)


def test_mixer_subset_makes_queries_of_some_tokens() -> None:
    module, x = make({"cross_attn": True, "use_flash_attn": True}), randn(2, 5, EMBED)
    torch.testing.assert_close(module(x, mixer_subset=slice(0, 1)), module(x)[:, :1])


def test_cross_attention_of_packed_sequences() -> None:
    module = make({"cross_attn": True, "use_flash_attn": True})
    x, x_kv = randn(7, EMBED), randn(9, EMBED, seed=1)
    cu_k = torch.tensor([0, 6, 9], dtype=torch.int32)
    out = module(x, x_kv, cu_seqlens=CU, max_seqlen=5, cu_seqlens_k=cu_k, max_seqlen_k=6)
    apart = [module(x[None, :2], x_kv[None, :6]), module(x[None, 2:], x_kv[None, 6:])]
    torch.testing.assert_close(out, torch.cat(apart, dim=1)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"num_heads_kv": 2},
        {"num_heads_kv": 2, "causal": True},
        {"rotary_emb_dim": 16, "causal": True},
        {"rotary_emb_dim": 8, "num_heads_kv": 2, "rotary_emb_scale_base": 64.0},
    ],
    ids=["causal", "gqa", "gqa-causal", "rotary", "xpos-gqa"],
)
def test_packed_sequences_equal_a_padded_batch(options: dict[str, Any]) -> None:
    flash, plain = (make(options, use_flash_attn=use) for use in (True, False))
    x, mask = randn(3, 8, EMBED), torch.arange(8) < torch.tensor([[8], [1], [5]])
    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, mask)
    out = flash(packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    padded = plain(x, key_padding_mask=mask) * mask.unsqueeze(-1)
    torch.testing.assert_close(pad_input(out, indices, 3, 8), padded)


# --- MHA with a KV cache ---

CACHED: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-rotary-gqa": {"rotary_emb_dim": 16, "num_heads_kv": 2},
    "plain-cross": {"cross_attn": True},
    "flash": {"use_flash_attn": True},
    "flash-cross-gqa": {"use_flash_attn": True, "cross_attn": True, "num_heads_kv": 2},
    "flash-gqa": {"use_flash_attn": True, "num_heads_kv": 2},
    "flash-rotary": {"use_flash_attn": True, "rotary_emb_dim": 16},
    "flash-rotary-partial": {
        "use_flash_attn": True,
        "rotary_emb_dim": 6,
        "rotary_emb_interleaved": True,
    },
    "flash-xpos": {"use_flash_attn": True, "rotary_emb_dim": 16, "rotary_emb_scale_base": 64.0},
    "flash-alibi": {"use_flash_attn": True, "use_alibi": True},
    "flash-window": {"use_flash_attn": True, "window_size": (3, 0)},
    "flash-scale": {"use_flash_attn": True, "softmax_scale": 0.4},
}


@pytest.mark.parametrize("options", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize("steps", [[6, 1, 1, 1], [4, 3, 2], [1] * 9], ids=str)
@torch.inference_mode()
def test_cached_steps_equal_the_whole_sequence(options: dict[str, Any], steps: list[int]) -> None:
    module = make(options, causal=True, layer_idx=3).eval()
    x = randn(2, 9, EMBED)
    whole = module(x)
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    outs = []
    for tokens in x.split(steps, dim=1):
        outs.append(module(tokens, inference_params=params))
        params.seqlen_offset += tokens.shape[1]
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)
    hk = options.get("num_heads_kv", 4)
    assert params.key_value_memory_dict[3].shape == (2, 12, 2, hk, 16)
    assert list(params.key_value_memory_dict) == [3]


@pytest.mark.parametrize("rotary_emb_dim", [0, 16])
@torch.inference_mode()
def test_rows_of_different_lengths_decode_together(rotary_emb_dim: int) -> None:
    module = make(
        {"rotary_emb_dim": rotary_emb_dim}, causal=True, layer_idx=0, use_flash_attn=True
    ).eval()
    lengths = [5, 2, 7]
    x = randn(3, 8, EMBED)
    params = InferenceParams(max_seqlen=10, max_batch_size=3)
    module(x[:, :7], inference_params=params)
    params.lengths_per_sample = torch.tensor(lengths, dtype=torch.int32)
    params.seqlen_offset = 7
    new = randn(3, 1, EMBED, seed=5)
    out = module(new, inference_params=params)
    for row, length in enumerate(lengths):
        whole = torch.cat([x[row : row + 1, :length], new[row : row + 1]], dim=1)
        torch.testing.assert_close(out[row : row + 1], module(whole)[:, -1:])


@pytest.mark.parametrize(
    ("use_flash_attn", "with_lengths"),
    [(False, False), (True, False), (True, True)],
    ids=["plain", "flash", "flash-lengths"],
)
@torch.inference_mode()
def test_micro_batches_share_one_cache(use_flash_attn: bool, with_lengths: bool) -> None:
    options = {"rotary_emb_dim": 16, "causal": True, "layer_idx": 0}
    module = make(options, use_flash_attn=use_flash_attn).eval()
    x, params = randn(4, 6, EMBED), InferenceParams(max_seqlen=6, max_batch_size=4)
    prompts = {0: 5, 2: 3}
    for first, length in prompts.items():
        params.batch_size_offset = first
        module(x[first : first + 2, :length], inference_params=params)
    if with_lengths:
        params.lengths_per_sample = torch.tensor([5, 5, 3, 3], dtype=torch.int32)
    for first, length in prompts.items():
        params.batch_size_offset, params.seqlen_offset = first, length
        rows = x[first : first + 2, : length + 1]
        out = module(rows[:, -1:], inference_params=params)
        torch.testing.assert_close(out, module(rows)[:, -1:])


@torch.inference_mode()
def test_allocated_cache_is_used() -> None:
    module = make({"num_heads_kv": 2}, layer_idx=1, causal=True, use_flash_attn=True)
    cache = module.allocate_inference_cache(2, 6)
    assert cache.shape == (2, 6, 2, 2, 16)
    assert cache.dtype == torch.float32
    assert module.allocate_inference_cache(2, 6, torch.bfloat16).dtype == torch.bfloat16
    params = InferenceParams(6, 2, key_value_memory_dict={1: cache})
    x = randn(2, 4, EMBED)
    module(x, inference_params=params)
    kv = module.Wqkv(x)[..., EMBED:].unflatten(-1, (2, 2, 16))
    assert torch.equal(cache[:, :4], kv)


def test_update_kv_cache_appends_and_returns_all() -> None:
    params, kv = InferenceParams(max_seqlen=5, max_batch_size=2), randn(2, 5, 2, 1, 4)
    assert torch.equal(_update_kv_cache(kv[:, :3], params, 7), kv[:, :3])
    params.seqlen_offset = 3
    assert torch.equal(_update_kv_cache(kv[:, 3:], params, 7), kv)
    params.seqlen_offset = 4
    with pytest.raises(ValueError, match=r"of 6 tokens, do not fit the cache of layer 7"):
        _update_kv_cache(kv[:, 3:], params, 7)
    params.seqlen_offset, params.batch_size_offset = 0, 1
    with pytest.raises(ValueError, match=r"2 sequences from row 1 on"):
        _update_kv_cache(kv, params, 7)


# --- MHA: what it rejects ---

BAD_OPTIONS = [
    ({"num_heads_kv": 3}, "num_heads must be divisible by num_heads_kv"),
    ({"num_heads_kv": 0}, "num_heads_kv is 0; num_heads must be divisible by num_heads_kv"),
    ({"use_alibi": True}, "use_alibi needs use_flash_attn"),
    ({"window_size": (4, 0)}, "a local window needs use_flash_attn"),
    ({"cross_attn": True, "rotary_emb_dim": 16}, "does not support cross-attention"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
def test_rejected_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="MHA: .*" + message):
        make(options)


def test_rejected_sizes_and_extensions() -> None:
    for size, heads in ((65, 4), (64, 0)):
        with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads"):
            MHA(size, heads)
    with pytest.raises(ImportError, match="fused_dense is not installed"):
        make({"fused_bias_fc": True})


FLASH = {"use_flash_attn": True}
MASK = torch.ones(2, 3, dtype=torch.bool)
BAD_CALLS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"x_kv": randn(2, 3, EMBED)}, "x_kv needs cross_attn"),
    ({}, {"mixer_subset": slice(0, 1)}, "mixer_subset needs cross_attn"),
    (FLASH, {"cu_seqlens": CU}, "cu_seqlens needs max_seqlen"),
    ({}, {"cu_seqlens": CU, "max_seqlen": 5}, "cu_seqlens needs use_flash_attn"),
    ({**FLASH, "dwconv": True}, {"cu_seqlens": CU, "max_seqlen": 5}, "excludes dwconv"),
    (FLASH, {"key_padding_mask": MASK}, "key_padding_mask needs use_flash_attn=False"),
    (
        FLASH,
        {"cu_seqlens": CU, "max_seqlen": 5, "key_padding_mask": MASK},
        "cu_seqlens excludes key_padding_mask",
    ),
    ({"layer_idx": 0}, {"inference_params": True, "key_padding_mask": MASK}, "a KV cache excludes"),
    ({"layer_idx": 0, "dwconv": True}, {"inference_params": True}, "a KV cache excludes dwconv"),
    ({"layer_idx": 0}, {"inference_params": True, "causal": True}, "a KV cache excludes causal"),
    ({}, {"inference_params": True}, "layer_idx is None"),
    ({"layer_idx": 0}, {"inference_params": MASK.sum(1)}, "lengths_per_sample needs use_flash"),
]


@pytest.mark.parametrize(("options", "call", "message"), BAD_CALLS, ids=[m for *_, m in BAD_CALLS])
def test_rejected_calls(options: dict[str, Any], call: dict[str, Any], message: str) -> None:
    if "inference_params" in call:
        lengths = call["inference_params"]
        lengths = lengths if isinstance(lengths, Tensor) else None
        call = {**call, "inference_params": InferenceParams(4, 2, lengths_per_sample=lengths)}
    with pytest.raises(ValueError, match=message):
        make(options)(randn(2, 3, EMBED), **call)


# --- FlashMHA, compile, names ---


def test_flash_mha_is_self_attention_by_the_functions() -> None:
    torch.manual_seed(0)
    module = FlashMHA(EMBED, 4, causal=True, layer_idx=2)
    x = randn(2, 5, EMBED)
    out = module(x)
    assert isinstance(out, Tensor)
    assert torch.equal(out, make({"causal": True, "use_flash_attn": True})(x))
    assert module.layer_idx == 2
    assert FlashMHA(EMBED, 4, dropout=0.1, dtype=torch.float64).inner_attn.drop.p == 0.1


@compiles
@pytest.mark.parametrize("options", [{}, {"num_heads_kv": 2, "rotary_emb_dim": 16}], ids=str)
def test_compiled_in_one_graph_equals_eager(options: dict[str, Any]) -> None:
    module = make(options, use_flash_attn=True, causal=True)
    x = randn(2, 5, EMBED)
    eager = forward_backward(module, x, None)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for (name, got), (_, expected) in zip(forward_backward(compiled, x, None), eager):
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "name",
    [
        "flash_attn_qkvpacked_func",
        "flash_attn_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_with_kvcache",
    ],
)
def test_functions_are_importable_from_here(name: str) -> None:
    assert getattr(mha, name) is getattr(flash_attn, name)
