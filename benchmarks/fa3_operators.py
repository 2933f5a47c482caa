"""The operators of FlashAttention-3's extension, without autograd, as all benchmarks call them."""

from __future__ import annotations

from typing import Any, Optional

Window = tuple[int, int]


def forward(
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    window: Window = (-1, -1),
    starts: Optional[Any] = None,
    longest: Optional[int] = None,
) -> Any:
    """(out, softmax_lse); `starts` and `longest` of packed sequences."""
    import torch

    return torch.ops.flash_attn_3.fwd.default(
        q,
        k,
        v,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        is_causal=causal,
        window_size_left=window[0],
        window_size_right=window[1],
        num_splits=1,
    )[:2]


def backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    causal: bool,
    window: Window = (-1, -1),
    starts: Optional[Any] = None,
    longest: Optional[int] = None,
    deterministic: bool = False,
) -> list[Any]:
    """dq, dk and dv."""
    import torch

    made = [torch.empty_like(x) for x in (q, k, v)]
    packed = (starts, starts, None, None, longest, longest)
    given = (dout, q, k, v, out, lse, *made, *packed, None, causal, *window)
    torch.ops.flash_attn_3.bwd.default(*given, deterministic=deterministic)
    return made
