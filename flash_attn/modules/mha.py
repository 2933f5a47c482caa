"""Multi-head attention with its projections: rotary, GQA, cross-attention, packing, KV cache.

The attention modules under it (`modules.flash`, `modules.plain`) and the packed functions are
importable from here too, as published.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.flash import (
    FlashAttention,
    FlashAttention2,
    FlashCrossAttention,
    FlashSelfAttention,
    get_alibi_slopes,
)
from flash_attn.modules.kv_cache import _update_kv_cache, layer_cache
from flash_attn.modules.plain import CrossAttention, SelfAttention
from flash_attn.utils.generation import InferenceParams

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashAttention",
    "FlashAttention2",
    "FlashCrossAttention",
    "FlashMHA",
    "FlashSelfAttention",
    "SelfAttention",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_alibi_slopes",
]


def _require(holds: bool, function: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{function}: {message}")


def _causal_conv(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A depthwise convolution of (b, s, features) over the present token and those before it."""
    return conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


def _depthwise(features: int, where: dict[str, Any]) -> nn.Conv1d:
    return nn.Conv1d(features, features, kernel_size=3, padding=2, groups=features, **where)


class MHA(nn.Module):
    """Multi-head self- or cross-attention.

    num_heads_kv: fewer for GQA and MQA; None is num_heads. cross_attn: keys and values come from
    x_kv, through `Wq` and `Wkv` instead of `Wqkv`. dropout: of the attention matrix, while
    training. layer_idx: the key of this layer in a KV cache. dwconv: a causal depthwise convolution
    of width 3 behind the projections. rotary_emb_*: see `RotaryEmbedding`; 0 is none. use_alibi,
    window_size: need use_flash_attn. use_flash_attn: the functions of this package, else plain
    torch. return_residual: return (out, x). checkpointing: recompute attention in the backward
    pass. fused_bias_fc: needs the fused_dense extension, which this package does not have, so True
    raises ImportError. Raises ValueError for options that exclude each other.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.dwconv = dwconv
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        self._check_options(fused_bias_fc, use_alibi, window_size)
        self.head_dim = embed_dim // num_heads
        where = {"device": device, "dtype": dtype}
        self._make_projections(qkv_proj_bias, out_proj_bias, where)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                interleaved=rotary_emb_interleaved,
                scale_base=rotary_emb_scale_base,
                device=device,
            )
        options: dict[str, Any] = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
        }
        self.inner_attn: FlashSelfAttention | SelfAttention
        self.inner_cross_attn: FlashCrossAttention | CrossAttention
        if use_flash_attn:
            slopes = None
            if use_alibi:
                slopes = torch.tensor(get_alibi_slopes(num_heads), device=device).float()
            options |= {"window_size": window_size, "alibi_slopes": slopes}
            self.inner_attn = FlashSelfAttention(**options)
            self.inner_cross_attn = FlashCrossAttention(**options)
        else:
            self.inner_attn = SelfAttention(**options)
            self.inner_cross_attn = CrossAttention(**options)

    def _check_options(
        self, fused_bias_fc: bool, use_alibi: bool, window_size: tuple[int, int]
    ) -> None:
        if fused_bias_fc:
            raise ImportError(
                "MHA: fused_bias_fc is True; fused_dense is not installed, and no part of this "
                "package"
            )
        hq, hk = self.num_heads, self.num_heads_kv
        _require(
            hq > 0 and self.embed_dim % hq == 0,
            "MHA",
            f"embed_dim is {self.embed_dim}, num_heads is {hq}; "
            "embed_dim must be divisible by num_heads",
        )
        _require(
            hk > 0 and hq % hk == 0,
            "MHA",
            f"num_heads is {hq}, num_heads_kv is {hk}; num_heads must be divisible by num_heads_kv",
        )
        _require(self.use_flash_attn or not use_alibi, "MHA", "use_alibi needs use_flash_attn=True")
        _require(
            self.use_flash_attn or tuple(window_size) == (-1, -1),
            "MHA",
            f"window_size is {window_size}; a local window needs use_flash_attn=True",
        )
        _require(
            not (self.cross_attn and self.rotary_emb_dim > 0),
            "MHA",
            "rotary embedding does not support cross-attention",
        )

    def _make_projections(
        self, qkv_proj_bias: bool, out_proj_bias: bool, where: dict[str, Any]
    ) -> None:
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        qkv_dim = self.embed_dim + kv_dim
        if self.cross_attn:
            self.Wq = nn.Linear(self.embed_dim, self.embed_dim, bias=qkv_proj_bias, **where)
            self.Wkv = nn.Linear(self.embed_dim, kv_dim, bias=qkv_proj_bias, **where)
        else:
            self.Wqkv = nn.Linear(self.embed_dim, qkv_dim, bias=qkv_proj_bias, **where)
        if self.dwconv and not self.cross_attn and self.num_heads == self.num_heads_kv:
            self.dwconv_qkv = _depthwise(qkv_dim, where)
        elif self.dwconv:
            self.dwconv_q = _depthwise(self.embed_dim, where)
            self.dwconv_kv = _depthwise(kv_dim, where)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=out_proj_bias, **where)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An uninitialised KV cache (batch_size, max_seqlen, 2, hk, d) for this layer."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return weight.new_empty(shape, dtype=weight.dtype if dtype is None else dtype)

    def _update_kv_cache(self, kv: Tensor, inference_params: InferenceParams) -> Tensor:
        return _update_kv_cache(kv, inference_params, self.layer_idx)

    def _check_call(
        self,
        x_kv: Tensor | None,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        mixer_subset: Tensor | None,
        inference_params: InferenceParams | None,
        options: dict[str, Any],
    ) -> None:
        def require(holds: bool, message: str) -> None:
            _require(holds, "MHA.forward", message)

        if not self.cross_attn:
            require(x_kv is None, "x_kv needs cross_attn=True")
            require(mixer_subset is None, "mixer_subset needs cross_attn=True")
        if cu_seqlens is not None:
            require(max_seqlen is not None, "cu_seqlens needs max_seqlen")
            require(key_padding_mask is None, "cu_seqlens excludes key_padding_mask")
            require(self.use_flash_attn, "cu_seqlens needs use_flash_attn=True")
            require(not self.dwconv, "cu_seqlens excludes dwconv, which needs (b, s, embed_dim)")
        if key_padding_mask is not None:
            require(
                not self.use_flash_attn,
                "key_padding_mask needs use_flash_attn=False; with the flash functions, unpad the "
                "input (flash_attn.bert_padding) and give cu_seqlens",
            )
        if inference_params is not None:
            require(
                key_padding_mask is None and cu_seqlens is None,
                "a KV cache excludes key_padding_mask and cu_seqlens",
            )
            require(not self.dwconv, "a KV cache excludes dwconv, whose window it does not keep")
            require(not options, f"a KV cache excludes {', '.join(options)}")
            require(
                self.use_flash_attn or inference_params.lengths_per_sample is None,
                "lengths_per_sample needs use_flash_attn=True",
            )

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: (b, s, embed_dim), or (total, embed_dim) with cu_seqlens int32 (b + 1,), max_seqlen.

        x_kv: the source of keys and values, for cross_attn; None is x. key_padding_mask: bool
        (b, sk), True for keys to attend to, without use_flash_attn. mixer_subset: which tokens of x
        make queries, for cross_attn. inference_params: append to a KV cache and attend to all of
        it. cu_seqlens_k, max_seqlen_k: those of x_kv where they differ. options: others of the
        attention module, such as causal. Returns what x is, or that and x with return_residual.
        Raises ValueError for arguments that exclude each other.
        """
        self._check_call(
            x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params, options
        )
        if self.use_flash_attn:
            options |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        else:
            options["key_padding_mask"] = key_padding_mask
        if self.cross_attn:
            queries = x if mixer_subset is None else x[:, mixer_subset]
            q, kv = self._project_apart(queries, x if x_kv is None else x_kv)
        else:
            heads = self._rotate(self._project(x), cu_seqlens, max_seqlen, inference_params)
            q = heads[..., : self.num_heads, :]
            kv = heads[..., self.num_heads :, :].unflatten(-2, (2, self.num_heads_kv))
        if inference_params is not None:
            context = self._attend_with_cache(q, kv, inference_params)
        elif not self.cross_attn and self.num_heads == self.num_heads_kv:
            qkv = heads.unflatten(-2, (3, self.num_heads))
            context = self._call(self.inner_attn, qkv, **options)
        else:
            if cu_seqlens is not None:
                options["cu_seqlens_k"] = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
                options["max_seqlen_k"] = max_seqlen if max_seqlen_k is None else max_seqlen_k
            elif not self.use_flash_attn:
                options["is_self"] = not self.cross_attn
            context = self._call(self.inner_cross_attn, q, kv, **options)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _call(self, attention: nn.Module, *tensors: Tensor, **options: Any) -> Tensor:
        if self.checkpointing:
            return checkpoint(attention, *tensors, use_reentrant=False, **options)
        return attention(*tensors, **options)

    def _project(self, x: Tensor) -> Tensor:
        """The heads of Q, K and V behind each other: (..., hq + 2 * hk, d)."""
        qkv = self.Wqkv(x)
        if self.dwconv and self.num_heads == self.num_heads_kv:
            qkv = _causal_conv(self.dwconv_qkv, qkv)
        elif self.dwconv:
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
            pair = (_causal_conv(self.dwconv_q, q), _causal_conv(self.dwconv_kv, kv))
            qkv = torch.cat(pair, dim=-1)
        return qkv.unflatten(-1, (self.num_heads + 2 * self.num_heads_kv, self.head_dim))

    def _project_apart(self, x: Tensor, x_kv: Tensor) -> tuple[Tensor, Tensor]:
        q, kv = self.Wq(x), self.Wkv(x_kv)
        if self.dwconv:
            q, kv = _causal_conv(self.dwconv_q, q), _causal_conv(self.dwconv_kv, kv)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        return q, kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))

    def _rotate(
        self,
        heads: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        inference_params: InferenceParams | None,
    ) -> Tensor:
        """Rotate the Q and K heads in place, if at all; return `heads`."""
        if self.rotary_emb_dim <= 0:
            return heads
        hq, hk = self.num_heads, self.num_heads_kv
        if cu_seqlens is not None and max_seqlen is not None:
            q, k = heads[:, :hq], heads[:, hq : hq + hk]
            self.rotary_emb.rotate_varlen_(q, k, cu_seqlens, max_seqlen)
            return heads
        offset: int | Tensor = 0
        if inference_params is not None:
            offset = self._cached_lengths(heads.shape[0], inference_params)
            max_seqlen = inference_params.max_seqlen
        return self.rotary_emb(heads, seqlen_offset=offset, max_seqlen=max_seqlen, num_heads_q=hq)

    @staticmethod
    def _cached_lengths(b: int, inference_params: InferenceParams) -> int | Tensor:
        if inference_params.lengths_per_sample is None:
            return inference_params.seqlen_offset
        first = inference_params.batch_size_offset
        return inference_params.lengths_per_sample[first : first + b]

    def _attend_with_cache(
        self, q: Tensor, kv: Tensor, inference_params: InferenceParams
    ) -> Tensor:
        """Append kv (b, s, 2, hk, d) to the cache; attention of q to all of the cache."""
        cached = self._cached_lengths(q.shape[0], inference_params)
        # All sequences of a prompt end where the cache does, so plain causal alignment serves.
        is_prompt = not isinstance(cached, Tensor) and cached == 0
        attention = self.inner_cross_attn
        if is_prompt or not isinstance(attention, FlashCrossAttention):
            return attention(q, self._update_kv_cache(kv, inference_params))
        cache = layer_cache(kv, inference_params, self.layer_idx)
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=cached,
            softmax_scale=attention.softmax_scale,
            causal=attention.causal,
            window_size=attention.window_size,
            alibi_slopes=attention.alibi_slopes,
        )


class FlashMHA(MHA):
    """Multi-head self-attention by the flash functions (the FlashAttention-Plus class).

    `MHA` with use_flash_attn; packed sequences and a KV cache (with layer_idx) as there. Not the
    class of `flash_attn.flash_attention`, which has the same name and returns a pair.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        causal: bool = False,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            causal=causal,
            layer_idx=layer_idx,
            use_flash_attn=True,
            device=device,
            dtype=dtype,
        )
