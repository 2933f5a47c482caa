"""The module classes of FlashAttention 1, which many models still import from here.

Packed QKV in, a pair out. The classes of the same names in `flash_attn.modules.mha` differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import pad_input, unpad_input


def _refuse_weights(function: str, need_weights: bool) -> None:
    if need_weights:
        raise ValueError(
            f"{function}: need_weights is True; the attention matrix is never made, so it must be "
            "False"
        )


def _check_shape(qkv: Tensor, rule: str, dims: int) -> None:
    if qkv.dim() != dims or qkv.shape[-3] != 3:
        raise ValueError(f"FlashAttention: qkv has shape {tuple(qkv.shape)}; it must be {rule}")


class FlashAttention(nn.Module):
    """softmax(q k^T * softmax_scale) v, without ever holding the attention matrix.

    softmax_scale: None is d ** -0.5. attention_dropout: while training only.
    """

    def __init__(self, softmax_scale: float | None = None, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout

    def forward(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_s: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """qkv: (b, s, 3, h, d); or (nnz, 3, h, d) with cu_seqlens int32 (b + 1,) and max_s.

        key_padding_mask: bool (b, s), True for real tokens; the others take no part and get zeros.
        Returns `(out, None)`, out (b, s, h, d) or (nnz, h, d). Raises ValueError for need_weights,
        for shapes that do not fit, and for a mask together with cu_seqlens.
        """
        _refuse_weights("FlashAttention", need_weights)
        options: dict[str, Any] = {
            "dropout_p": self.dropout_p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": causal,
        }
        if cu_seqlens is not None:
            _check_shape(qkv, "(nnz, 3, h, d) with cu_seqlens", dims=4)
            if max_s is None or key_padding_mask is not None:
                raise ValueError(
                    f"FlashAttention: max_s is {max_s}, key_padding_mask is "
                    f"{'None' if key_padding_mask is None else 'a tensor'}; "
                    "with cu_seqlens, max_s must be given and key_padding_mask must not"
                )
            return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_s, **options), None
        _check_shape(qkv, "(b, s, 3, h, d)", dims=5)
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **options), None
        tokens, indices, cu_seqlens, max_s, _ = unpad_input(qkv, key_padding_mask)
        out = flash_attn_varlen_qkvpacked_func(tokens, cu_seqlens, max_s, **options)
        return pad_input(out, indices, *qkv.shape[:2]), None


class FlashMHA(nn.Module):
    """Multi-head self-attention: the projection `Wqkv`, `FlashAttention`, and `out_proj`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        batch_first: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not batch_first:
            raise ValueError("FlashMHA: batch_first is False; only (b, s, embed_dim) is supported")
        if embed_dim % num_heads:
            raise ValueError(
                f"FlashMHA: embed_dim is {embed_dim}, num_heads is {num_heads}; "
                "embed_dim must be divisible by num_heads"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn = FlashAttention(attention_dropout=attention_dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """x: (b, s, embed_dim). key_padding_mask: bool (b, s), True for real tokens.

        Returns `(out, None)`, out (b, s, embed_dim). Raises ValueError for need_weights.
        """
        _refuse_weights("FlashMHA", need_weights)
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        context, _ = self.inner_attn(qkv, key_padding_mask=key_padding_mask, causal=self.causal)
        return self.out_proj(context.flatten(-2)), None
