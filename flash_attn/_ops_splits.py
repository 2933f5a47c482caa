"""The `flash_attn_3::` operators about splits: a call's plan, and results of parts made one.

`fwd_combine` and `get_scheduler_metadata` have the published C++ schemas. Shapes and options:
docstrings of `flash_attn_interface`.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from flash_attn import _arguments, _checks, _fakes, _support, backends
from flash_attn._registration import define, define_shared

COMBINE = "flash_attn_3::fwd_combine"
COMBINE_PARTS = "flash_attn_3::_flash_attn_combine"
METADATA = "flash_attn_3::get_scheduler_metadata"

SCHEMAS = {
    COMBINE: (
        "(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
        "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)"
    ),
    COMBINE_PARTS: (
        "(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype=None) -> (Tensor, Tensor)"
    ),
    METADATA: (
        "(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, "
        "int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
        "Tensor? seqused_q=None, Tensor? leftpad_k=None, int? page_size=None, "
        "int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
        "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, "
        "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> Tensor"
    ),
}


def check_metadata(name: str, scheduler_metadata: Optional[Tensor], q: Tensor) -> None:
    """Metadata of `get_scheduler_metadata` is int32 on q's device."""
    x = scheduler_metadata
    if x is not None and (x.dtype != torch.int32 or x.device != q.device):
        _arguments.fail(
            name,
            f"scheduler_metadata must be int32 on {q.device}, as get_scheduler_metadata returns it",
            f"{x.dtype} on {x.device}",
        )


def _combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: Optional[torch.dtype] = None
) -> tuple[Tensor, Tensor]:
    _check_parts(out_partial, lse_partial, None)
    out, lse = backends.combine(out_partial, lse_partial, COMBINE)
    return out.to(torch.float32 if out_dtype is None else out_dtype), lse


def _fwd_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Optional[Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    if out is None:
        return _combine(out_partial, lse_partial, out_dtype)
    _check_parts(out_partial, lse_partial, out)
    result, lse = backends.combine(out_partial, lse_partial, COMBINE)
    return out.copy_(result), lse


def _check_parts(out_partial: Tensor, lse_partial: Tensor, out: Optional[Tensor]) -> None:
    for argument, x in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if x.dtype != torch.float32:
            _arguments.fail(COMBINE, f"{argument} must have dtype float32", f"{x.dtype}")
    if out_partial.dim() != 5 or lse_partial.shape != out_partial.shape[:-1]:
        _arguments.fail(
            COMBINE,
            "out_partial must have shape (num_splits, b, s, h, d) and lse_partial the same without "
            "d",
            f"shapes {tuple(out_partial.shape)} and {tuple(lse_partial.shape)}",
        )
    if out is not None and out.shape != out_partial.shape[1:]:
        _arguments.fail(
            COMBINE,
            f"out must have shape (b, s, h, d) = {tuple(out_partial.shape[1:])}",
            f"shape {tuple(out.shape)}",
        )
    _checks.check_devices(COMBINE, out_partial=out_partial, lse_partial=lse_partial, out=out)


def _get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    headdim_v: int,
    qkv_dtype: torch.dtype,
    seqused_k: Tensor,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    cu_seqlens_k_new: Optional[Tensor] = None,
    seqused_q: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    page_size: Optional[int] = None,
    max_seqlen_k_new: int = 0,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: Optional[bool] = None,
    sm_margin: int = 0,
) -> Tensor:
    _arguments.check_num_splits(METADATA, num_splits, _support.MAX_SPLITS_FA3)
    if seqused_k.dtype != torch.int32 or tuple(seqused_k.shape) != (batch_size,):
        _arguments.fail(
            METADATA,
            f"cache_seqlens must be int32 of shape (batch_size,) = ({batch_size},)",
            f"{seqused_k.dtype} of shape {tuple(seqused_k.shape)}",
        )
    return torch.full_like(seqused_k, max(num_splits, 1))


_LIBRARY = torch.library.Library("flash_attn_3", "FRAGMENT")
fwd_combine = define_shared(_LIBRARY, COMBINE, SCHEMAS[COMBINE], _fwd_combine)
define(_LIBRARY, COMBINE_PARTS, SCHEMAS[COMBINE_PARTS], _combine, _fakes.combine)
get_scheduler_metadata = define_shared(
    _LIBRARY, METADATA, SCHEMAS[METADATA], _get_scheduler_metadata, _fakes.get_scheduler_metadata
)
