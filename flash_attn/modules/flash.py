"""Modules around the public functions: they hold the options, and drop out only while training."""

from __future__ import annotations

import math
from typing import Any, Callable

from torch import Tensor, nn

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slope of every head, as the ALiBi paper (arXiv:2108.12409) sets them.

    For a power of two: the geometric sequence from 2 ** (-8 / nheads) with that ratio. Otherwise
    those of the power of two below, then every other one of the power of two above.
    """
    if nheads < 1:
        raise ValueError(f"get_alibi_slopes: nheads is {nheads}; it must be positive")
    power = 2 ** math.floor(math.log2(nheads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return slopes + between[: nheads - power]


class _Options(nn.Module):
    """The options that every function takes."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.window_size = window_size
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.deterministic = deterministic

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Options:
        """Let `module.to(bfloat16)` cast all but the slopes: the functions take them in float32."""
        slopes = self.alibi_slopes
        super()._apply(fn, recurse)
        moved = self.alibi_slopes
        if slopes is not None and moved is not None and moved.dtype != slopes.dtype:
            self.alibi_slopes = slopes.to(moved.device)
        return self

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }

    def _varlen(self, **lengths: Tensor | int | None) -> dict[str, Any]:
        missing = [name for name, value in lengths.items() if value is None]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: {', '.join(missing)} is None; packed sequences need all "
                f"of {', '.join(lengths)}"
            )
        return lengths


class FlashSelfAttention(_Options):
    """`flash_attn_qkvpacked_func`, or its varlen form when given cu_seqlens."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """qkv: (b, s, 3, h, d), or (total, 3, h, d) with cu_seqlens int32 (b + 1,) and max_seqlen.

        causal: None is the constructor's. Returns (b, s, h, d) or (total, h, d).
        """
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        lengths = self._varlen(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, **lengths, **options)


class FlashCrossAttention(_Options):
    """`flash_attn_kvpacked_func`, or its varlen form when given cu_seqlens."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """q: (b, sq, hq, d). kv: (b, sk, 2, hk, d).

        With cu_seqlens, q is (total_q, hq, d), kv (total_k, 2, hk, d), and all of cu_seqlens,
        max_seqlen, cu_seqlens_k and max_seqlen_k are needed. Returns q's shape.
        """
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        lengths = self._varlen(
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen_k,
        )
        return flash_attn_varlen_kvpacked_func(q, kv, **lengths, **options)


class FlashAttention2(_Options):
    """Attention of separate q, k and v with every option of `flash_attn_func`.

    causal: bottom-right aligned. softmax_scale: None is d ** -0.5. attention_dropout: while
    training only. window_size: (left, right), -1 is unbounded. softcap: 0 is off; not together with
    dropout. alibi_slopes: float32 (hq,) or (b, hq). deterministic: of the backward pass.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )
        self.softcap = softcap

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """q: (b, sq, hq, d). k, v: (b, sk, hk, d), hk divides hq. Returns q's shape.

        With cu_seqlens_q, q is (total_q, hq, d) and k, v are (total_k, hk, d), and all of
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k are needed. causal: None is the
        constructor's.
        """
        options = {**self._options(causal), "softcap": self.softcap}
        if cu_seqlens_q is None:
            return flash_attn_func(q, k, v, **options)
        lengths = self._varlen(
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
        )
        return flash_attn_varlen_func(q, k, v, **lengths, **options)


class FlashAttention(FlashAttention2):
    """Attention of separate q, k and v with a fixed head layout (the FlashAttention-Plus class).

    Not the class of `flash_attn.flash_attention`, which has the same name and takes packed QKV.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
    ) -> None:
        super().__init__(
            causal=causal,
            attention_dropout=dropout,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
        )
        self.num_heads = num_heads
        self.head_dim = head_dim

    def reset_parameters(self) -> None:
        """There are none to reset; callers that initialise every layer may still call this."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        """q: (b, sq, num_heads, head_dim). k, v: (b, sk, hk, head_dim). Returns q's shape."""
        if q.shape[-2:] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"FlashAttention: q has shape {tuple(q.shape)}; "
                f"it must be (b, sq, {self.num_heads}, {self.head_dim})"
            )
        return super().forward(q, k, v)
