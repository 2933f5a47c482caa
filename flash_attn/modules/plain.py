"""Attention in plain torch, written out: what `MHA(use_flash_attn=False)` runs.

It holds the whole (b, h, sq, sk) score tensor, and masks by adding -10000 as published. A row whose
keys are all masked is therefore attention as if nothing were masked, where the flash functions give
zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MASKED = -10000.0


def _mask(
    q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None, is_self: bool
) -> Tensor | None:
    """What to add to the scores, broadcastable to (b, h, sq, sk)."""
    sq, sk = q.shape[1], k.shape[1]
    mask: Tensor | None = None
    keys: int | Tensor = sk
    if key_padding_mask is not None:
        if key_padding_mask.shape != (k.shape[0], sk):
            raise ValueError(
                f"attention: key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must "
                f"be (b, sk) = {(k.shape[0], sk)}, True for keys to attend to"
            )
        is_key = key_padding_mask.bool()[:, None, None]
        mask = q.new_zeros(is_key.shape).masked_fill(~is_key, _MASKED)
        keys = sk if is_self else is_key.sum(-1, keepdim=True)
    if causal:
        row, column = (torch.arange(n, device=q.device) for n in (sq, sk))
        is_future = column > row[:, None] + keys - sq
        future = q.new_zeros(is_future.shape).masked_fill(is_future, _MASKED)
        mask = future if mask is None else mask + future
    return mask


class CrossAttention(nn.Module):
    """softmax(q k^T * softmax_scale + mask) v in plain torch; dropout while training.

    causal: the default for `forward`; aligned to the last key, under a key_padding_mask to as many
    as are there. softmax_scale: None is d ** -0.5.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        is_self: bool = False,
    ) -> Tensor:
        """q: (b, sq, hq, d). kv: (b, sk, 2, hk, d), hk divides hq. Returns (b, sq, hq, d).

        key_padding_mask: bool (b, sk), True for keys to attend to. is_self: q and kv are of the
        same tokens, so query i stands beside key i whatever the mask says. Raises ValueError for
        other shapes, or head counts that do not divide.
        """
        if q.dim() != 4 or kv.shape != (q.shape[0], *kv.shape[1:2], 2, *kv.shape[3:4], q.shape[3]):
            raise ValueError(
                f"{type(self).__name__}: q has shape {tuple(q.shape)}, kv {tuple(kv.shape)}; they "
                "must be (b, sq, hq, d) and (b, sk, 2, hk, d)"
            )
        k, v = kv.unbind(2)
        hq, hk = q.shape[2], k.shape[2]
        if hk == 0 or hq % hk:
            raise ValueError(
                f"{type(self).__name__}: q has {hq} heads, kv has {hk}; "
                "the heads of kv must divide those of q"
            )
        if hq != hk:
            k, v = (x.repeat_interleave(hq // hk, dim=2) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
        causal = self.causal if causal is None else causal
        mask = _mask(q, k, causal, key_padding_mask, is_self)
        if mask is not None:
            scores = scores + mask
        attention = self.drop(torch.softmax(scores, dim=-1, dtype=v.dtype))
        return torch.einsum("bhqk,bkhd->bqhd", attention, v)


class SelfAttention(CrossAttention):
    """`CrossAttention` of packed Q, K and V."""

    def forward(  # type: ignore[override]
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """qkv: (b, s, 3, h, d). Returns (b, s, h, d). The rest is as in `CrossAttention`."""
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise ValueError(
                f"{type(self).__name__}: qkv has shape {tuple(qkv.shape)}; it must be "
                "(b, s, 3, h, d)"
            )
        return super().forward(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask, is_self=True)
