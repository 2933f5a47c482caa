"""Calls as Megatron, mamba and sglang make them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from compare import check
from consumers import FP32, SCALE, agrees, dense, starts_of, tensors
from oracle import kvcache_attention, varlen_attention
from torch import Tensor

import flash_attn
import flash_attn_interface as fa3

# --- Megatron, mamba ----------------------------------------------------------------------------


def rotary(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    (angle,) = tensors((positions, dim // 2), seed=7)
    return angle.cos(), angle.sin()


def cache_agrees(out: Tensor, q: Tensor, before: list[Tensor], offset: int, **options: Any) -> None:
    lengths = torch.full((q.shape[0],), offset, dtype=torch.int32)
    runs = [
        kvcache_attention(
            q, before[0].clone(), before[1].clone(), cache_seqlens=lengths, **options, dtype=dtype
        )[0]
        for dtype in (torch.float64, FP32)
    ]
    check("out", out, runs[0], runs[1])


def test_megatron_decoding_with_permuted_caches_and_an_int_offset() -> None:
    """The inference buffers are (s, b, h, d); their permuted views are written in place."""
    q, k, v, k_buffer, v_buffer = tensors(
        (1, 2, 4, 16), (1, 2, 2, 16), (1, 2, 2, 16), (20, 3, 2, 16), (20, 3, 2, 16)
    )
    q, k, v = (x.permute(1, 0, 2, 3) for x in (q, k, v))
    caches = [x[:, :2].permute(1, 0, 2, 3) for x in (k_buffer, v_buffer)]
    before = [x.clone() for x in caches]
    third_row = k_buffer[:, 2].clone()
    cos, sin = rotary(20, 16)
    out = flash_attn.flash_attn_with_kvcache(
        q=q,
        k_cache=caches[0],
        v_cache=caches[1],
        k=k,
        v=v,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=6,
        rotary_interleaved=False,
    )
    cache_agrees(
        out, q, before, 6, k=k, v=v, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=False
    )
    assert torch.equal(v_buffer[6, :2], v[:, 0])
    assert torch.equal(k_buffer[:, 2], third_row)


def test_megatron_dynamic_batching() -> None:
    q, k_cache, v_cache = tensors((7, 4, 16), (4, 256, 2, 16), (4, 256, 2, 16))
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    cu_q, cu_k = starts_of(3, 4), starts_of(10, 260)
    options = {"softmax_scale": SCALE, "causal": True, "window_size": (-1, -1)}
    result = flash_attn.flash_attn_varlen_func(
        q, k_cache, v_cache, cu_q, cu_k, 4, 260, **options, block_table=table,
        return_attn_probs=True,
    )  # fmt: skip
    out, lse, _ = result
    assert lse.shape == (4, 7)
    keys, values = (
        torch.cat([x[table[i].long()].flatten(0, 1)[:n] for i, n in enumerate((10, 260))])
        for x in (k_cache, v_cache)
    )
    agrees(out, varlen_attention, q, keys, values, cu_q, cu_k, softmax_scale=SCALE, causal=True)
    last = torch.tensor([2, 6])
    pair = flash_attn.flash_attn_with_kvcache(
        q=q[last][:, None],
        k_cache=k_cache,
        v_cache=v_cache,
        cache_seqlens=torch.tensor([10, 260], dtype=torch.int32),
        **options,
        block_table=table,
        num_splits=0,
        return_softmax_lse=True,
    )
    assert len(pair) == 2
    check("out", pair[0][:, 0], out[last].double(), out[last])


def test_megatron_reads_the_fa3_signature() -> None:
    parameters = inspect.signature(fa3._flash_attn_forward).parameters
    assert "out_" in parameters
    assert "out" not in parameters


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_mamba_decoding_with_strided_caches(as_tensor: bool) -> None:
    kv_cache, q, kv = tensors((3, 20, 2, 2, 16), (2, 1, 4, 16), (2, 1, 2, 2, 16))
    used = kv_cache[:2]
    before = [used[:, :, i].clone() for i in range(2)]
    cos, sin = rotary(20, 16)
    offset: Any = torch.full((2,), 5, dtype=torch.int32) if as_tensor else 5
    out = flash_attn.flash_attn_with_kvcache(
        q,
        used[:, :, 0],
        used[:, :, 1],
        kv[:, :, 0],
        kv[:, :, 1],
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=offset,
        softmax_scale=SCALE,
        causal=True,
        rotary_interleaved=True,
    )
    options = {"k": kv[:, :, 0], "v": kv[:, :, 1], "rotary_cos": cos, "rotary_sin": sin}
    cache_agrees(out, q, before, 5, **options, softmax_scale=SCALE, causal=True)
    assert torch.equal(kv_cache[:2, 5, 1], kv[:, 0, 1])


def test_mamba_reads_the_rotary_caches() -> None:
    from flash_attn.layers.rotary import RotaryEmbedding

    embedding = RotaryEmbedding(16, base=10000.0, interleaved=True)
    embedding._update_cos_sin_cache(8, device=torch.device("cpu"), dtype=FP32)
    assert embedding.interleaved is True
    assert embedding._cos_cached.shape == (8, 8)
    assert embedding._sin_cached.shape == (8, 8)


# --- sglang ---


def test_sglang_calls() -> None:
    q, k, v = dense()
    out = flash_attn.flash_attn_func(q=q, k=k, v=v, softmax_scale=SCALE, causal=True)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    cu = starts_of(12, 12)
    packed, lse, _ = flash_attn.flash_attn_varlen_func(
        *flat,
        cu,
        cu,
        12,
        12,
        softmax_scale=SCALE,
        causal=True,
        window_size=(-1, -1),
        softcap=0.0,
        return_attn_probs=True,
    )
    assert torch.equal(packed.unflatten(0, (2, 12)), out)
    assert lse.shape == (4, 24)
