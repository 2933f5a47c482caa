"""Every rejected argument: its exception, its message, and that nothing was written before it.

A row changes a good call. Published rules keep the published exception and wording; a message
begins with the function that was called and says what was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flash_attn
import flash_attn_2_cuda
import flash_attn_interface as fa3
from flash_attn import flash_attn_interface as fa2

B, SQ, SK, HQ, HK, D = 2, 5, 7, 4, 2, 16
FP8 = torch.float8_e4m3fn


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# --- Good calls ---------------------------------------------------------------------------------

Q, K, V = normal(B, SQ, HQ, D), normal(B, SK, HK, D), normal(B, SK, HK, D)
PQ, PK, PV = normal(9, HQ, D), normal(12, HK, D), normal(12, HK, D)
LENGTHS = {
    "cu_seqlens_q": ints(0, 4, 9),
    "cu_seqlens_k": ints(0, 5, 12),
    "max_seqlen_q": 5,
    "max_seqlen_k": 7,
}
PAGES = normal(4, 4, HK, D)
TABLE = ints(0, 1, 2, 3).view(2, 2)
CACHE = normal(B, 10, HK, D)
NEW = {"k": normal(B, 1, HK, D), "v": normal(B, 1, HK, D), "cache_seqlens": 3}
COS = torch.linspace(-1.0, 1.0, 12 * 8).view(12, 8)
ROTARY = {**NEW, "rotary_cos": COS, "rotary_sin": COS}
SCORES = {
    "dropout_p": 0.0,
    "softmax_scale": 0.25,
    "causal": True,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
OUT, LSE, _, _ = fa2._flash_attn_forward(Q, K, V, *SCORES.values(), False)
GRADS = {name: torch.zeros_like(x) for name, x in (("dq", Q), ("dk", K), ("dv", V))}
FP8_CACHES = {"k_cache": CACHE.to(FP8), "v_cache": CACHE.to(FP8)}
EIGHTS = {"q": Q.to(FP8), "k": K.to(FP8), "v": V.to(FP8)}

# By name in messages: the function and the arguments of a good call.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "flash_attn_func": (flash_attn.flash_attn_func, {"q": Q, "k": K, "v": V}),
    "flash_attn_kvpacked_func": (
        flash_attn.flash_attn_kvpacked_func,
        {"q": Q, "kv": normal(B, SK, 2, HK, D)},
    ),
    "flash_attn_qkvpacked_func": (
        flash_attn.flash_attn_qkvpacked_func,
        {"qkv": normal(B, SQ, 3, HQ, D)},
    ),
    "flash_attn_varlen_func": (
        flash_attn.flash_attn_varlen_func,
        {"q": PQ, "k": PK, "v": PV, **LENGTHS},
    ),
    "flash_attn_varlen_kvpacked_func": (
        flash_attn.flash_attn_varlen_kvpacked_func,
        {"q": PQ, "kv": normal(12, 2, HK, D), **LENGTHS},
    ),
    "flash_attn_varlen_qkvpacked_func": (
        flash_attn.flash_attn_varlen_qkvpacked_func,
        {"qkv": normal(9, 3, HQ, D), "cu_seqlens": ints(0, 4, 9), "max_seqlen": 5},
    ),
    "flash_attn_with_kvcache": (
        flash_attn.flash_attn_with_kvcache,
        {"q": normal(B, 1, HQ, D), "k_cache": CACHE, "v_cache": CACHE + 1},
    ),
    "flash_attn::_flash_attn_forward": (
        fa2._flash_attn_forward,
        {"q": Q, "k": K, "v": V, **SCORES, "return_softmax": False},
    ),
    "flash_attn::_flash_attn_varlen_forward": (
        fa2._flash_attn_varlen_forward,
        {"q": PQ, "k": PK, "v": PV, **LENGTHS, **SCORES},
    ),
    "flash_attn::_flash_attn_backward": (
        fa2._flash_attn_backward,
        {
            "dout": OUT,
            "q": Q,
            "k": K,
            "v": V,
            "out": OUT,
            "softmax_lse": LSE,
            **GRADS,
            **SCORES,
            "deterministic": False,
        },
    ),
    "FA3 flash_attn_func": (fa3.flash_attn_func, {"q": Q, "k": K, "v": V}),
    "FA3 flash_attn_varlen_func": (
        fa3.flash_attn_varlen_func,
        {"q": PQ, "k": PK, "v": PV, **LENGTHS},
    ),
    "FA3 flash_attn_qkvpacked_func": (
        fa3.flash_attn_qkvpacked_func,
        {"qkv": normal(B, SQ, HQ + 2 * HK, D), "num_heads_q": HQ},
    ),
    "FA3 flash_attn_with_kvcache": (
        fa3.flash_attn_with_kvcache,
        {"q": normal(B, 1, HQ, D), "k_cache": CACHE, "v_cache": CACHE + 1},
    ),
    "flash_attn_3::_flash_attn_forward": (
        torch.ops.flash_attn_3._flash_attn_forward,
        {"q": Q, "k": K, "v": V},
    ),
    "flash_attn_combine": (
        fa3.flash_attn_combine,
        {"out_partial": normal(3, B, SQ, HQ, D), "lse_partial": normal(3, B, SQ, HQ)},
    ),
    "get_scheduler_metadata": (
        fa3.get_scheduler_metadata,
        {
            "batch_size": 2,
            "max_seqlen_q": 1,
            "max_seqlen_k": 9,
            "num_heads_q": HQ,
            "num_heads_kv": HK,
            "headdim": D,
            "cache_seqlens": ints(1, 2),
        },
    ),
    "flash_attn_2_cuda.fwd": (
        flash_attn_2_cuda.fwd,
        {
            "q": Q,
            "k": K,
            "v": V,
            "out": None,
            "alibi_slopes": None,
            "p_dropout": 0.0,
            "softmax_scale": 0.25,
            "is_causal": True,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "return_softmax": False,
        },
    ),
}

Row = tuple[str, str, dict[str, Any], Any, str]

# --- Rows: function, id, what changes, exception, message after the name ------------------------

FUNC, VARLEN, CACHED = "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"
KV, QKV = "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"
FORWARD, BACKWARD = "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_backward"
VARLEN_FORWARD = "flash_attn::_flash_attn_varlen_forward"


def sized(d: int, dv: int) -> dict[str, Tensor]:
    return {"q": normal(1, 2, 1, d), "k": normal(1, 3, 1, d), "v": normal(1, 3, 1, dv)}


DENSE: list[Row] = [
    (FUNC, "q_none", {"q": None}, TypeError, "q must be a tensor; got NoneType"),
    (FUNC, "k_list", {"k": [1.0]}, TypeError, "k must be a tensor; got list"),
    (FUNC, "v_numpy", {"v": np.zeros(3)}, TypeError, "v must be a tensor; got ndarray"),
    (KV, "kv_none", {"kv": None}, TypeError, "kv must be a tensor; got NoneType"),
    (QKV, "qkv_none", {"qkv": None}, TypeError, "qkv must be a tensor; got NoneType"),
    (FUNC, "int32", {"q": Q.int(), "k": K.int(), "v": V.int()}, RuntimeError,
     "FlashAttention on cpu supports only float64, float32, .* got q of torch.int32 on cpu"),
    (FUNC, "complex", {"q": Q.to(torch.complex64)}, RuntimeError,
     "FlashAttention on cpu supports only .* got q of torch.complex64"),
    (FUNC, "k_dtype", {"k": K.half()}, RuntimeError,
     "query and key must have the same dtype; got q torch.float32, k torch.float16"),
    (FUNC, "v_dtype", {"v": V.double()}, RuntimeError,
     "query and value must have the same dtype; got q torch.float32, v torch.float64"),
    (FUNC, "q_scalar", {"q": torch.tensor(1.0)}, RuntimeError,
     r"q must have shape \(batch_size, seqlen, num_heads, head_size\); got shape \(\)"),
    (FUNC, "q_rank_3", {"q": Q[0]}, RuntimeError,
     r"q must have shape \(batch_size, seqlen, num_heads, head_size\); got shape \(5, 4, 16\)"),
    (FUNC, "k_rank_5", {"k": K[None]}, RuntimeError, r"k must have shape \(batch_size, seqlen, "),
    (FUNC, "batch_0", {"q": Q[:0], "k": K[:0], "v": V[:0]}, RuntimeError,
     r"batch size must be positive; got q of shape \(0, 5, 4, 16\)"),
    (FUNC, "batch_differs", {"k": K[:1], "v": V[:1]}, RuntimeError,
     "q and k must have the same batch size; got q with 2, k with 1"),
    (FUNC, "v_length", {"v": V[:, 1:]}, RuntimeError,
     r"v must have the shape of k in all but the last dimension; got k \(2, 7, 2, 16\), v \(2, 6"),
    (FUNC, "head_dim_differs", {"q": Q[..., :8]}, RuntimeError,
     "q and k must have the same head dimension; got q 8, k 16"),
    (FUNC, "heads_3_of_2", {"q": Q[:, :, :3]}, RuntimeError,
     "Number of heads in key/value must divide number of heads in query; got q with 3 heads, k wi"),
    (FUNC, "no_key_heads", {"k": K[:, :, :0], "v": V[:, :, :0]}, RuntimeError,
     "Number of heads in key/value must divide number of heads in query; got q with 4 heads, k wi"),
    (FUNC, "head_dim_257", sized(257, 257), RuntimeError,
     "FlashAttention forward only supports head dimension at most 256; got head dimension 257"),
    (FUNC, "head_dim_v_513", sized(64, 513), RuntimeError,
     "FlashAttention forward only supports head dimension at most 256; got .* 513 of v"),
    (FUNC, "head_dim_v_257", sized(65, 257), RuntimeError,
     "FlashAttention forward only supports head dimension at most 256; got .* 257 of v"),
    (FUNC, "head_dim_0", sized(0, 0), ValueError, "head dimension must be positive; got 0"),
    (FUNC, "dropout_1", {"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\); got 1.0"),
    (FUNC, "dropout_negative", {"dropout_p": -0.1}, ValueError, r"dropout_p must lie in \[0, 1\)"),
    (FUNC, "dropout_nan", {"dropout_p": math.nan}, ValueError, "dropout_p must lie in .* got nan"),
    (FUNC, "softcap_negative", {"softcap": -1.0}, ValueError,
     r"softcap must be .*; got -1.0"),
    (FUNC, "softcap_nan", {"softcap": math.nan}, ValueError, r"softcap must be .*; got nan"),
    (FUNC, "softcap_inf", {"softcap": math.inf}, ValueError, r"softcap must be .*; got inf"),
    (FUNC, "softcap_dropout", {"softcap": 2.0, "dropout_p": 0.1}, RuntimeError,
     "Softcapping does not support dropout for now; got softcap 2.0, dropout_p 0.1"),
    (FUNC, "scale_nan", {"softmax_scale": math.nan}, ValueError, "softmax_scale must .* got nan"),
    (FUNC, "scale_inf", {"softmax_scale": math.inf}, ValueError, "softmax_scale must .* got inf"),
    (FUNC, "window_1", {"window_size": (1,)}, ValueError, r"window_size must be .*; got \(1,\)"),
    (FUNC, "window_3", {"window_size": (1, 2, 3)}, ValueError, "window_size must be .* 3"),
    (FUNC, "window_int", {"window_size": 4}, (TypeError, ValueError), "window_size must be .* 4"),
    (FUNC, "window_none", {"window_size": None}, (TypeError, ValueError), "window_size must be"),
    (FUNC, "alibi_dtype", {"alibi_slopes": torch.rand(HQ).double()}, RuntimeError,
     "ALiBi slopes must have dtype fp32; got torch.float64"),
    (FUNC, "alibi_shape", {"alibi_slopes": torch.rand(3)}, RuntimeError,
     r"alibi_slopes must have shape \(num_heads\) = \(4,\) or \(batch_size, num_heads\) = \(2"),
    (FUNC, "alibi_batch", {"alibi_slopes": torch.rand(1, HQ)}, RuntimeError,
     r"alibi_slopes must have shape .*; got shape \(1, 4\)"),
    (FUNC, "k_device", {"k": K.to("meta")}, RuntimeError, "k must be on cpu.* got meta"),
    (FUNC, "alibi_device", {"alibi_slopes": torch.rand(HQ, device="meta")}, RuntimeError,
     "alibi_slopes must be on cpu.* got meta"),
    (QKV, "packed_2", {"qkv": normal(B, SQ, 2, HQ, D)}, RuntimeError,
     r"qkv must have shape \(batch_size, seqlen, 3, num_heads, head_size\); got shape \(2, 5, 2"),
    (QKV, "packed_rank", {"qkv": normal(SQ, 3, HQ, D)}, RuntimeError, r"qkv must have shape"),
    (KV, "packed_3", {"kv": normal(B, SK, 3, HK, D)}, RuntimeError,
     r"kv must have shape \(batch_size, seqlen, 2, num_heads, head_size\); got shape \(2, 7, 3"),
    (KV, "k_dtype", {"kv": normal(B, SK, 2, HK, D).half()}, RuntimeError,
     "query and key must have the same dtype"),
    (FORWARD, "return_softmax", {"return_softmax": True}, RuntimeError,
     r"return_softmax is only supported when p_dropout > 0.0; got p_dropout 0.0"),
]  # fmt: skip

PACKED: list[Row] = [
    (VARLEN, "q_rank", {"q": PQ[None]}, RuntimeError,
     r"q must have shape \(total, num_heads, head_size\); got shape \(1, 9, 4, 16\)"),
    (VARLEN, "k_rank", {"k": PAGES, "v": PAGES}, RuntimeError,
     r"k must have shape \(total, num_heads, head_size\)"),
    (VARLEN, "cu_q_none", {"cu_seqlens_q": None}, TypeError,
     "cu_seqlens_q must be a tensor; got NoneType"),
    (VARLEN, "cu_k_none", {"cu_seqlens_k": None}, TypeError,
     "cu_seqlens_k must be a tensor; got NoneType"),
    (VARLEN, "cu_q_float", {"cu_seqlens_q": torch.tensor([0.0, 4.0, 9.0])}, RuntimeError,
     "cu_seqlens_q must have dtype int32; got torch.float32"),
    (VARLEN, "cu_k_int64", {"cu_seqlens_k": ints(0, 5, 12, dtype=torch.int64)}, RuntimeError,
     "cu_seqlens_k must have dtype int32; got torch.int64"),
    (VARLEN, "cu_rank", {"cu_seqlens_q": ints(0, 4, 9)[None]}, RuntimeError,
     r"cu_seqlens_q must have shape \(batch_size \+ 1\); got shape \(1, 3\)"),
    (VARLEN, "cu_one_entry", {"cu_seqlens_q": ints(0)}, RuntimeError,
     r"cu_seqlens_q must have shape \(batch_size \+ 1\); got shape \(1,\)"),
    (VARLEN, "cu_k_batch", {"cu_seqlens_k": ints(0, 12)}, RuntimeError,
     r"cu_seqlens_k must have shape \(batch_size \+ 1\) = \(3,\); got shape \(2,\)"),
    (VARLEN, "cu_negative", {"cu_seqlens_q": ints(0, -1, 9)}, ValueError,
     r"cu_seqlens_q\[1\] is -1; it must lie between 0 and 9"),
    (VARLEN, "cu_falls", {"cu_seqlens_k": ints(0, 12, 5)}, ValueError,
     r"cu_seqlens_k\[2\] is 5; it must lie between 12 and 12, the rows"),
    (VARLEN, "cu_beyond", {"cu_seqlens_q": ints(0, 4, 10)}, ValueError,
     r"cu_seqlens_q\[2\] is 10; it must lie between 4 and 9, the rows"),
    (VARLEN, "max_q_small", {"max_seqlen_q": 4}, ValueError,
     r"max_seqlen_q is 4, but the longest sequence has 5 rows \(sequence 1\); it must be at least"),
    (VARLEN, "max_k_small", {"max_seqlen_k": 6}, ValueError,
     r"max_seqlen_k is 6, but the longest sequence has 7 rows \(sequence 1\); it must be at least"),
    (VARLEN, "alibi_batch", {"alibi_slopes": torch.rand(3, HQ)}, RuntimeError,
     r"alibi_slopes must have shape .* = \(2, 4\); got shape \(3, 4\)"),
    ("flash_attn_varlen_qkvpacked_func", "packed_2", {"qkv": normal(9, 2, HQ, D)}, RuntimeError,
     r"qkv must have shape \(total, 3, num_heads, head_size\); got shape \(9, 2, 4, 16\)"),
    ("flash_attn_varlen_qkvpacked_func", "cu_none", {"cu_seqlens": None}, TypeError,
     r"cu_seqlens\w* must be a tensor; got NoneType"),
    ("flash_attn_varlen_kvpacked_func", "packed_rank", {"kv": normal(2, 12, 2, HK, D)},
     RuntimeError, r"kv must have shape \(total, 2, num_heads, head_size\)"),
    (VARLEN_FORWARD, "return_softmax", {"return_softmax": True}, RuntimeError,
     "return_softmax is only supported when p_dropout > 0.0"),
    (VARLEN_FORWARD, "seqused_dtype", {"seqused_k": ints(5, 7, dtype=torch.int64)}, RuntimeError,
     "seqused_k must have dtype int32; got torch.int64"),
    (VARLEN_FORWARD, "seqused_shape", {"seqused_k": ints(5)}, RuntimeError,
     r"seqused_k must have shape \(batch_size\) = \(2,\); got shape \(1,\)"),
    (VARLEN_FORWARD, "seqused_beyond", {"seqused_k": ints(6, 7)}, ValueError,
     r"seqused_k\[0\] is 6; it must lie between 0 and 5, the rows that its sequence has"),
    (VARLEN_FORWARD, "seqused_negative", {"seqused_k": ints(-1, 7)}, ValueError,
     r"seqused_k\[0\] is -1; it must lie between 0"),
    (VARLEN_FORWARD, "leftpad_dtype", {"leftpad_k": torch.rand(2)}, RuntimeError,
     "leftpad_k must have dtype int32; got torch.float32"),
    (VARLEN_FORWARD, "leftpad_beyond", {"leftpad_k": ints(6, 0)}, ValueError,
     r"leftpad_k\[0\] is 6; it must lie between 0 and 5, the key length of its sequence"),
    (VARLEN_FORWARD, "leftpad_negative", {"leftpad_k": ints(-1, 0)}, ValueError,
     r"leftpad_k\[0\] is -1; it must lie between 0"),
]  # fmt: skip

PAGED_CALL = {"k": PAGES, "v": PAGES, "block_table": TABLE}
PAGED: list[Row] = [
    (VARLEN, "table_dtype", {**PAGED_CALL, "block_table": TABLE.long()}, RuntimeError,
     "block_table must have dtype torch.int32; got torch.int64"),
    (VARLEN, "table_rank", {**PAGED_CALL, "block_table": TABLE[0]}, RuntimeError,
     r"block_table must have shape \(batch_size, max_num_blocks\) = \(2, any\); got shape \(2,\)"),
    (VARLEN, "table_batch", {**PAGED_CALL, "block_table": TABLE[:1]}, RuntimeError,
     r"block_table must have shape \(batch_size, max_num_blocks\)"),
    (VARLEN, "table_beyond", {**PAGED_CALL, "block_table": TABLE + 1}, ValueError,
     r"block_table\[1, 1\] is 4; it must lie between 0 and 3, the last page"),
    (VARLEN, "table_negative", {**PAGED_CALL, "block_table": TABLE - 1}, ValueError,
     r"block_table\[\d, \d\] is -1; it must lie between 0 and 3, the last page"),
    (VARLEN, "table_short", {**PAGED_CALL, "cu_seqlens_k": ints(0, 3, 12), "max_seqlen_k": 9},
     ValueError, r"cu_seqlens_k\[2\] - cu_seqlens_k\[1\] is 9; .* 8, .*block_table .*\(2 pages"),
    (VARLEN, "page_0", {**PAGED_CALL, "k": PAGES[:, :0], "v": PAGES[:, :0]}, RuntimeError,
     "Paged KV cache block size must be positive"),
    (VARLEN, "paged_max_k_small", {**PAGED_CALL, "max_seqlen_k": 2}, ValueError,
     "max_seqlen_k is 2, but the longest sequence has 7 rows"),
]  # fmt: skip

PAGED_CACHE = {"block_table": ints(0, 1).view(2, 1)}
CACHES: list[Row] = [
    (CACHED, "q_none", {"q": None}, TypeError, "q must be a tensor; got NoneType"),
    (CACHED, "k_cache_none", {"k_cache": None}, TypeError, "k_cache must be a tensor"),
    (CACHED, "k_cache_stride", {"k_cache": normal(B, 10, D, HK).transpose(2, 3)}, AssertionError,
     "k_cache must have contiguous last dimension"),
    (CACHED, "v_cache_stride", {"v_cache": normal(B, 10, D, HK).transpose(2, 3)}, AssertionError,
     "v_cache must have contiguous last dimension"),
    (CACHED, "q_dtype", {"q": normal(B, 1, HQ, D).half()}, RuntimeError,
     "query and key must have the same dtype"),
    (CACHED, "q_batch", {"q": normal(3, 1, HQ, D)}, RuntimeError,
     "q and k must have the same batch size; got q with 3, k with 2"),
    (CACHED, "v_cache_length", {"v_cache": CACHE[:, 1:]}, RuntimeError,
     "v must have the shape of k in all but the last dimension"),
    (CACHED, "softcap", {"softcap": -1.0}, ValueError, "softcap must be"),
    (CACHED, "window_3", {"window_size": (1, 2, 3)}, ValueError, "window_size must be"),
    (CACHED, "window_1", {"window_size": (1,)}, ValueError, "window_size must be"),
    (CACHED, "seqlens_negative", {"cache_seqlens": -1}, ValueError,
     r"cache_seqlens\[0\] is -1; it must lie between 0 and 10"),
    (CACHED, "seqlens_beyond", {"cache_seqlens": ints(3, 11)}, ValueError,
     r"cache_seqlens\[1\] is 11; it must lie between 0 and 10"),
    (CACHED, "seqlens_int64", {"cache_seqlens": ints(3, 4, dtype=torch.int64)}, RuntimeError,
     "(cache_seqlens|seqlens_k) must have dtype int32; got torch.int64"),
    (CACHED, "seqlens_shape", {"cache_seqlens": ints(3)}, RuntimeError,
     r"\w+ must have shape \(batch_size\) = \(2,\); got shape \(1,\)"),
    (CACHED, "seqlens_huge", {"cache_seqlens": 2**40}, ValueError, "cache_seqlens"),
    (CACHED, "batch_idx_beyond", {"cache_batch_idx": ints(0, 2)}, ValueError,
     r"cache_batch_idx\[1\] is 2; it must lie between 0 and 1"),
    (CACHED, "batch_idx_negative", {"cache_batch_idx": ints(-1, 0)}, ValueError,
     r"cache_batch_idx\[0\] is -1; it must lie between 0 and 1"),
    (CACHED, "batch_idx_int64", {"cache_batch_idx": ints(0, 1, dtype=torch.int64)}, RuntimeError,
     "cache_batch_idx must have dtype int32; got torch.int64"),
    (CACHED, "batch_idx_shape", {"cache_batch_idx": ints(0)}, RuntimeError,
     r"cache_batch_idx must have shape \(batch_size\) = \(2,\); got shape \(1,\)"),
    (CACHED, "leftpad_int64", {"cache_leftpad": ints(0, 1, dtype=torch.int64)}, RuntimeError,
     "leftpad_k must have dtype int32; got torch.int64"),
    (CACHED, "leftpad_beyond", {"cache_leftpad": ints(4, 0), "cache_seqlens": 3}, ValueError,
     r"cache_leftpad\[0\] is 4; it must lie between 0 and 3"),
    (CACHED, "pages_and_batch_idx", {**PAGED_CACHE, "cache_batch_idx": ints(0, 1)}, RuntimeError,
     "Paged KVcache does not support cache_batch_idx"),
    (CACHED, "pages_and_leftpad", {**PAGED_CACHE, "cache_leftpad": ints(0, 1)}, RuntimeError,
     "We don't support Paged KV and leftpad_k running at the same time yet"),
    (CACHED, "page_beyond", {"block_table": ints(0, 2).view(2, 1)}, ValueError,
     r"block_table\[1, 0\] is 2; it must lie between 0 and 1, the last page"),
    (CACHED, "pages_short", {**PAGED_CACHE, "cache_seqlens": ints(3, 11)}, ValueError,
     r"cache_seqlens\[1\] is 11; it must lie between 0 and 10, .*\(1 pages of 10\)"),
    (CACHED, "splits_129", {"num_splits": 129}, RuntimeError,
     "num_splits > 128 not supported; got num_splits 129"),
    (CACHED, "splits_negative", {"num_splits": -1}, ValueError,
     r"num_splits must be 0 \(choose\) or positive; got -1"),
]  # fmt: skip

APPENDS: list[Row] = [
    (CACHED, "k_alone", {"k": NEW["k"], "cache_seqlens": 3}, RuntimeError,
     "If key is supplied, value must also be passed in; got no value"),
    (CACHED, "v_alone", {"v": NEW["v"], "cache_seqlens": 3}, RuntimeError,
     "If value is supplied, key must also be passed in; got no key"),
    (CACHED, "no_seqlens", {**NEW, "cache_seqlens": None}, RuntimeError,
     "If key is supplied, seqlens_k must also be passed in; got cache_seqlens None"),
    (CACHED, "full", {**NEW, "cache_seqlens": 10}, ValueError,
     r"cache_seqlens\[0\] is 10; it must lie between 0 and 9, the 10 keys .*, less those appended"),
    (CACHED, "one_overflows", {**NEW, "cache_seqlens": ints(3, 10)}, ValueError,
     r"cache_seqlens\[1\] is 10; it must lie between 0 and 9"),
    (CACHED, "negative", {**NEW, "cache_seqlens": ints(3, -1)}, ValueError,
     r"cache_seqlens\[1\] is -1"),
    (CACHED, "longer_than_cache",
     {"k": normal(B, 11, HK, D), "v": normal(B, 11, HK, D), "cache_seqlens": 0}, RuntimeError,
     "If key is supplied, it must have seqlen <= the seqlen of the KV cache; got k with 11 rows"),
    (CACHED, "heads", {**NEW, "k": normal(B, 1, HQ, D)}, RuntimeError,
     r"k must have shape .* = \(2, 1, 2, 16\); got shape \(2, 1, 4, 16\)"),
    (CACHED, "v_length", {**NEW, "v": normal(B, 2, HK, D)}, RuntimeError,
     r"v must have shape .* = \(2, 1, 2, 16\); got shape \(2, 2, 2, 16\)"),
    (CACHED, "rank", {**NEW, "k": normal(B, HK, D), "v": normal(B, HK, D)}, RuntimeError,
     r"k must have shape \(batch_size, seqlen_new, num_heads_k, head_size\)"),
    (CACHED, "dtype", {**NEW, "k": NEW["k"].half(), "v": NEW["v"].half()}, RuntimeError,
     "k must have the same dtype as query; got torch.float16, torch.float32"),
    (CACHED, "batch_idx", {**NEW, "cache_batch_idx": ints(0, 2)}, ValueError,
     r"cache_batch_idx\[1\] is 2"),
    (CACHED, "page", {**NEW, "block_table": ints(0, 2).view(2, 1)}, ValueError,
     r"block_table\[1, 0\] is 2"),
    (CACHED, "append_leftpad_beyond", {**NEW, "cache_leftpad": ints(5, 0)}, ValueError,
     r"cache_leftpad\[0\] is 5; it must lie between 0 and 4"),
    (CACHED, "rotary_without_k", {"rotary_cos": COS, "rotary_sin": COS}, RuntimeError,
     "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be pro"),
    (CACHED, "sin_without_k", {"rotary_sin": COS}, RuntimeError,
     "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be pro"),
    (CACHED, "cos_alone", {**NEW, "rotary_cos": COS}, RuntimeError,
     "rotary_cos and rotary_sin must be given together; got rotary_cos given, rotary_sin None"),
    (CACHED, "rotary_too_wide", {**NEW, "rotary_cos": normal(12, 16), "rotary_sin": normal(12, 16)},
     RuntimeError, "rotary_dim must be <= headdim; got 32, headdim 16"),
    (CACHED, "rotary_dim_8", {**NEW, "rotary_cos": COS[:, :4], "rotary_sin": COS[:, :4]},
     RuntimeError, "Only rotary dimensions divisible by 16 are currently supported"),
    (CACHED, "rotary_short", {**NEW, "rotary_cos": COS[:3], "rotary_sin": COS[:3]}, ValueError,
     "rotary_cos has 3 positions, but 4 are needed; cos/sin seqlen must be at least the seqlen of"),
    (CACHED, "rotary_short_for_queries",
     {**NEW, "q": normal(B, 4, HQ, D), "causal": True, "rotary_cos": COS[:5],
      "rotary_sin": COS[:5]}, ValueError, "rotary_cos has 5 positions, but 7 are needed"),
    (CACHED, "rotary_short_without_new_rows",
     {"k": NEW["k"][:, :0], "v": NEW["v"][:, :0], "cache_seqlens": 3,
      "rotary_cos": COS[:3], "rotary_sin": COS[:3]},
     ValueError, "rotary_cos has 3 positions, but 4 are needed"),
    (CACHED, "rotary_dtype", {**NEW, "rotary_cos": COS.half(), "rotary_sin": COS.half()},
     RuntimeError, "rotary_cos must have the same dtype as query; got torch.float16"),
    (CACHED, "rotary_shapes", {**NEW, "rotary_cos": COS, "rotary_sin": COS[:5]}, RuntimeError,
     r"rotary_cos and rotary_sin must have shape \(seqlen_ro, rotary_dim / 2\)"),
    (CACHED, "rotary_device", {**NEW, "rotary_cos": COS, "rotary_sin": COS.to("meta")},
     RuntimeError, "rotary_sin must be on cpu.* got meta"),
]  # fmt: skip

BACKWARDS: list[Row] = [
    (BACKWARD, "dout_shape", {"dout": OUT[:, :3]}, RuntimeError,
     r"dout must have shape \(like q, dim of v\) = \(2, 5, 4, 16\); got shape \(2, 3, 4, 16\)"),
    (BACKWARD, "dout_dtype", {"dout": OUT.half()}, RuntimeError,
     "query and dout must have the same dtype; got torch.float32, torch.float16"),
    (BACKWARD, "out_shape", {"out": OUT[..., :8]}, RuntimeError, "out must have shape"),
    (BACKWARD, "out_dtype", {"out": OUT.double()}, RuntimeError,
     "query and out must have the same dtype; got torch.float32, torch.float64"),
    (BACKWARD, "lse_shape", {"softmax_lse": LSE.transpose(1, 2)}, RuntimeError,
     r"softmax_lse must have shape .* = \(2, 4, 5\); got shape \(2, 5, 4\)"),
    (BACKWARD, "lse_dtype", {"softmax_lse": LSE.half()}, RuntimeError,
     "softmax_lse must have dtype (float32|torch.float32); got torch.float16"),
    (BACKWARD, "dq_shape", {"dq": torch.zeros(B, SQ, HQ, 8)}, RuntimeError,
     r"dq must have shape \(like q\) = \(2, 5, 4, 16\); got shape \(2, 5, 4, 8\)"),
    (BACKWARD, "dk_per_query_head", {"dk": torch.zeros(B, SK, HQ, D)}, RuntimeError,
     r"dk must have shape \(like k\) = \(2, 7, 2, 16\)"),
    (BACKWARD, "dv_dtype", {"dv": torch.zeros(B, SK, HK, D).half()}, RuntimeError,
     "dv must have the dtype and device of v; got torch.float16 on cpu, torch.float32 on cpu"),
    (BACKWARD, "rng_missing", {"dropout_p": 0.2}, ValueError,
     "rng_state of the forward pass must be given when dropout_p > 0; got None"),
    (BACKWARD, "rng_dtype", {"dropout_p": 0.2, "rng_state": torch.rand(2)}, ValueError,
     r"rng_state must be 2 int64 values; got torch.float32 of shape \(2,\)"),
    (BACKWARD, "rng_shape", {"dropout_p": 0.2, "rng_state": ints(1, 2, 3).long()}, ValueError,
     r"rng_state must be 2 int64 values; got torch.int64 of shape \(3,\)"),
    (BACKWARD, "head_dim_257",
     {"dout": normal(1, 2, 1, 257), "out": normal(1, 2, 1, 257), "softmax_lse": normal(1, 1, 2),
      **sized(257, 257), "dq": None, "dk": None, "dv": None},
     RuntimeError, "FlashAttention backward only supports head dimension at most 256"),
    (BACKWARD, "softcap_dropout",
     {"softcap": 2.0, "dropout_p": 0.1, "rng_state": ints(1, 2).long()}, RuntimeError,
     "Softcapping does not support dropout for now"),
    (BACKWARD, "fp8", {**EIGHTS, "dq": None, "dk": None, "dv": None}, RuntimeError,
     "FP8 inputs have no backward; got q of torch.float8_e4m3fn"),
]  # fmt: skip

FUNC_3, VARLEN_3 = "FA3 flash_attn_func", "FA3 flash_attn_varlen_func"
QKV_3, CACHED_3 = "FA3 flash_attn_qkvpacked_func", "FA3 flash_attn_with_kvcache"
PACKED_NEW = {"k": normal(2, HK, D), "v": normal(2, HK, D), "cache_seqlens": 3}
FA3: list[Row] = [
    (FUNC_3, "q_none", {"q": None}, TypeError, "q must be a tensor; got NoneType"),
    (FUNC_3, "k_none", {"k": None}, TypeError, "k must be a tensor; got NoneType"),
    (FUNC_3, "head_dim_0", sized(0, 8), ValueError, "head dimension must be positive"),
    (FUNC_3, "window_3", {"window_size": (1, 2, 3)}, ValueError, "window_size must be"),
    (FUNC_3, "qv_shape", {"qv": Q[..., :8]}, RuntimeError,
     r"qv must have shape \(like q, dim of v\) = \(2, 5, 4, 16\); got shape \(2, 5, 4, 8\)"),
    (FUNC_3, "qv_dtype", {"qv": Q.half()}, RuntimeError,
     "qv must have the dtype of q, and not FP8; got torch.float16, q torch.float32"),
    (FUNC_3, "qv_fp8", {**EIGHTS, "qv": Q.to(FP8)}, RuntimeError,
     "qv must have the dtype of q, and not FP8"),
    (FUNC_3, "sm_margin", {"sm_margin": -1}, ValueError,
     "sm_margin must be 0 or positive; got -1"),
    (FUNC_3, "descale_without_fp8", {"q_descale": torch.ones(B, HK)}, RuntimeError,
     "q_descale goes with FP8 inputs only; got q of torch.float32"),
    (FUNC_3, "descale_shape", {**EIGHTS, "q_descale": torch.ones(B, HQ)}, RuntimeError,
     r"q_descale must have shape \(batch_size, num_heads_k\) = \(2, 2\); got shape \(2, 4\)"),
    (FUNC_3, "descale_dtype", {**EIGHTS, "k_descale": torch.ones(B, HK).half()}, RuntimeError,
     "k_descale must have dtype float32; got torch.float16"),
    (FUNC_3, "descale_device", {**EIGHTS, "v_descale": torch.ones(B, HK, device="meta")},
     RuntimeError, "v_descale must be on cpu.* got meta"),
    (FUNC_3, "chunk_negative", {"attention_chunk": -1}, ValueError,
     r"attention_chunk must be 0 \(off\) or positive; got -1"),
    (FUNC_3, "splits_257", {"num_splits": 257}, RuntimeError,
     "num_splits > 256 not supported; got num_splits 257"),
    (FUNC_3, "splits_negative", {"num_splits": -1}, ValueError, "num_splits must be 0"),
    (FUNC_3, "mixed_fp8", {"q": Q.to(FP8)}, RuntimeError, "query and key must have the same dtype"),
    (VARLEN_3, "seqused_q_beyond", {"seqused_q": ints(5, 5)}, ValueError,
     r"seqused_q\[0\] is 5; it must lie between 0 and 4, the rows that its sequence has"),
    (VARLEN_3, "seqused_k_negative", {"seqused_k": ints(-1, 5)}, ValueError,
     r"seqused_k\[0\] is -1"),
    (VARLEN_3, "seqused_q_int64", {"seqused_q": ints(4, 5).long()}, RuntimeError,
     "seqused_q must have dtype int32; got torch.int64"),
    (VARLEN_3, "seqused_q_shape", {"seqused_q": ints(4)}, RuntimeError,
     r"seqused_q must have shape \(batch_size\) = \(2,\); got shape \(1,\)"),
    (VARLEN_3, "max_q_small", {"max_seqlen_q": 2}, ValueError, "max_seqlen_q is 2, but"),
    (QKV_3, "qkv_none", {"qkv": None}, TypeError, "qkv must be a tensor; got NoneType"),
    (QKV_3, "heads_odd", {"num_heads_q": 7}, RuntimeError,
     r"qkv must have shape \(batch_size, seqlen, num_heads_q \+ 2 \* num_heads_k, head_size\)"),
    (QKV_3, "heads_all", {"num_heads_q": 8}, RuntimeError, "qkv must have shape"),
    (QKV_3, "heads_negative", {"num_heads_q": -2}, (RuntimeError, ValueError),
     "num_heads_q|qkv must"),
    (QKV_3, "rank", {"qkv": normal(B, SQ, 3, HQ, D)}, RuntimeError, "qkv must have shape"),
    (QKV_3, "no_heads_given", {"num_heads_q": None}, RuntimeError,
     r"qkv must have shape \(batch_size, seqlen, 3, num_heads, head_size\)"),
    (CACHED_3, "fp8_keys_alone", {"k_cache": CACHE.to(FP8)}, RuntimeError,
     "key and value must have the same dtype; got k torch.float8_e4m3fn, v torch.float32"),
    (CACHED_3, "new_rows_of_an_fp8_cache", {**FP8_CACHES, **NEW, "cache_seqlens": 3}, RuntimeError,
     "k must have the same dtype as the cache; got torch.float32, torch.float8_e4m3fn"),
    (CACHED_3, "rotary_of_an_fp8_cache",
     {**FP8_CACHES, **ROTARY, "k": NEW["k"].to(FP8), "v": NEW["v"].to(FP8)}, RuntimeError,
     "FP8 keys are not rotated: rotate them, and the queries, before they are scaled"),
    (CACHED_3, "q_descale_of_an_fp8_cache", {**FP8_CACHES, "q_descale": torch.ones(B, HK)},
     RuntimeError, "q_descale goes with FP8 inputs only; got q of torch.float32"),
    (CACHED_3, "k_descale_without_fp8", {"k_descale": torch.ones(B, HK)},
     RuntimeError, "k_descale goes with FP8 inputs only; got k of torch.float32"),
    (CACHED_3, "metadata_dtype", {"scheduler_metadata": ints(1, 1).long()}, RuntimeError,
     "scheduler_metadata must be int32 on cpu, as get_scheduler_metadata returns it; got"),
    (CACHED_3, "splits_257", {"num_splits": 257}, RuntimeError, "num_splits > 256 not supported"),
    (CACHED_3, "table_row", {"page_table": ints(0, 1).view(2, 1), "cache_batch_idx": ints(2, 0)},
     ValueError, r"cache_batch_idx\[0\] is 2; it must lie between 0 and 1"),
    (CACHED_3, "new_rank", PACKED_NEW, RuntimeError,
     r"k must have shape \(batch_size, seqlen_new, num_heads_k, head_size\)"),
    (CACHED_3, "cu_new_beyond", {**PACKED_NEW, "cu_seqlens_k_new": ints(0, 1, 3)}, ValueError,
     r"cu_seqlens_k_new\[2\] is 3; it must lie between 1 and 2, the rows"),
    (CACHED_3, "cu_new_int64", {**PACKED_NEW, "cu_seqlens_k_new": ints(0, 1, 2).long()},
     RuntimeError, "cu_seqlens_k_new must have dtype int32; got torch.int64"),
    (CACHED_3, "cu_new_without_k", {"cu_seqlens_k_new": ints(0, 1, 2), "cache_seqlens": 3},
     (RuntimeError, ValueError), "cu_seqlens_k_new"),
    (CACHED_3, "rotary_seqlens_int64", {**ROTARY, "rotary_seqlens": ints(1, 2).long()},
     RuntimeError, "rotary_seqlens must have dtype int32; got torch.int64"),
    (CACHED_3, "rotary_seqlens_beyond", {**ROTARY, "rotary_seqlens": ints(12, 2)}, ValueError,
     "rotary_cos has 12 positions, but 13 are needed"),
    (CACHED_3, "rotary_seqlens_negative", {**ROTARY, "rotary_seqlens": ints(-1, 2)}, ValueError,
     r"rotary_seqlens\[0\] is -1"),
    (CACHED_3, "append_leftpad_beyond", {**NEW, "cache_leftpad": ints(5, 0)}, ValueError,
     r"cache_leftpad\[0\] is 5"),
    (CACHED_3, "cu_q_max_small",
     {"q": normal(2, HQ, D), "cu_seqlens_q": ints(0, 1, 2), "max_seqlen_q": 0}, ValueError,
     "max_seqlen_q is 0, but the longest sequence has 1 rows"),
    ("flash_attn_3::_flash_attn_forward", "k_new", {"k_new": K, "v_new": V}, RuntimeError,
     "the operator writes no argument.* got k_new"),
    ("flash_attn_3::_flash_attn_forward", "out_", {"out_": Q}, RuntimeError,
     "the operator writes no argument.* got out_"),
    ("flash_attn_3::_flash_attn_forward", "v_new_alone", {"v_new": V}, RuntimeError,
     "the operator writes no argument.* got v_new"),
    ("flash_attn_combine", "out_dtype", {"out_partial": normal(3, B, SQ, HQ, D).half()},
     RuntimeError, "out_partial must have dtype float32; got torch.float16"),
    ("flash_attn_combine", "lse_dtype", {"lse_partial": normal(3, B, SQ, HQ).double()},
     RuntimeError, "lse_partial must have dtype float32; got torch.float64"),
    ("flash_attn_combine", "lse_layout", {"lse_partial": normal(3, B, HQ, SQ)}, RuntimeError,
     r"out_partial must have shape \(num_splits, b, s, h, d\) and lse_partial the same without d"),
    ("flash_attn_combine", "out_shape", {"out": torch.zeros(B, SQ, HQ, 8)}, RuntimeError,
     "out must have shape"),
    ("get_scheduler_metadata", "seqlens_dtype", {"cache_seqlens": ints(1, 2).long()}, RuntimeError,
     r"cache_seqlens must be int32 of shape \(batch_size,\) = \(2,\); got torch.int64"),
    ("get_scheduler_metadata", "seqlens_shape", {"batch_size": 3}, RuntimeError,
     r"cache_seqlens must be int32 of shape \(batch_size,\) = \(3,\)"),
    ("get_scheduler_metadata", "splits_257", {"num_splits": 257}, RuntimeError,
     "num_splits > 256 not supported"),
]  # fmt: skip

EXTENSION: list[Row] = [
    ("flash_attn_2_cuda.fwd", "generator", {"gen": torch.Generator()}, RuntimeError,
     "the RNG `generator` argument is no longer supported and must be None"),
    ("flash_attn_2_cuda.fwd", "out_shape", {"out": torch.zeros(B, SQ, HQ, 8)}, RuntimeError,
     "out must have shape"),
    ("flash_attn_2_cuda.fwd", "out_dtype", {"out": torch.zeros(B, SQ, HQ, D).int()}, RuntimeError,
     "(Output must have the same dtype as inputs|out must have)"),
]  # fmt: skip

ROWS = [*DENSE, *PACKED, *PAGED, *CACHES, *APPENDS, *BACKWARDS, *FA3, *EXTENSION]


def snapshot(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors that hold values, wide enough to be compared."""
    return {
        name: x.detach().to(torch.float64, copy=True)
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.device.type == "cpu" and not x.is_complex()
    }


@pytest.mark.parametrize(
    ("name", "what", "changes", "error", "message"), ROWS, ids=[f"{r[0]}-{r[1]}" for r in ROWS]
)
def test_argument_is_rejected_before_anything_is_written(
    name: str, what: str, changes: dict[str, Any], error: Any, message: str
) -> None:
    function, good = CALLS[name]
    arguments = {
        key: x.clone() if isinstance(x, Tensor) and x.is_contiguous() else x
        for key, x in {**good, **changes}.items()
    }
    before = snapshot(arguments)
    called = name.replace("FA3 ", "")
    with pytest.raises(error, match=rf"(?s)^{called}: {message}") as caught:
        function(**arguments)
    assert caught.type in (error if isinstance(error, tuple) else (error,))
    for key, x in snapshot(arguments).items():
        assert torch.equal(before[key], x), f"{key} was changed"


@pytest.mark.parametrize("name", CALLS)
def test_the_unchanged_call_is_accepted(name: str) -> None:
    function, good = CALLS[name]
    result = function(**{k: x.clone() if isinstance(x, Tensor) else x for k, x in good.items()})
    first = result if isinstance(result, Tensor) else result[0]
    assert not first.isnan().any()


# Torch itself refuses these, by the operator's schema: it names the argument and what it found.
BY_SCHEMA = [
    ("dropout_p", "0.1"),
    ("dropout_p", None),
    ("softmax_scale", 1j),
    ("softmax_scale", torch.tensor([0.5, 0.2])),
    ("causal", "x"),
    ("softcap", None),
    ("alibi_slopes", [0.1] * HQ),
    ("window_size_left", 1.5),
    ("window_size_left", None),
    ("window_size_right", 2**63),
]


@pytest.mark.parametrize(("argument", "value"), BY_SCHEMA, ids=lambda x: str(x)[:20])
def test_a_value_of_the_wrong_type_is_named(argument: str, value: Any) -> None:
    function, good = CALLS[FORWARD]
    with pytest.raises(RuntimeError, match=rf"_flash_attn_forward\(\) .*argument '{argument}'"):
        function(**{**good, argument: value})


# --- What cannot be a row -----------------------------------------------------------------------


def test_attention_over_pages_has_no_backward() -> None:
    function, good = CALLS[VARLEN]
    arguments = {**good, **PAGED_CALL, "q": PQ.clone().requires_grad_()}
    out = function(**arguments)
    message = "^flash_attn_varlen_func: attention over pages has no backward"
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()


@pytest.mark.parametrize("option", [{"attention_chunk": 3}, {"qv": Q}], ids=["chunk", "qv"])
def test_fa3_options_without_backward_say_so(option: dict[str, Any]) -> None:
    out = fa3.flash_attn_func(Q.clone().requires_grad_(), K, V, **option)
    with pytest.raises(RuntimeError, match=f"FA3 backward does not support {next(iter(option))}"):
        out.sum().backward()


def test_fp8_keys_have_no_backward() -> None:
    out = flash_attn.flash_attn_func(Q.clone().requires_grad_(), K.to(FP8), V.to(FP8))
    with pytest.raises(RuntimeError, match="query and key must have the same dtype"):
        out.sum().backward()


def test_fp8_has_no_backward() -> None:
    q = Q.to(FP8).requires_grad_()
    out = fa3.flash_attn_func(q, EIGHTS["k"], EIGHTS["v"])
    with pytest.raises(RuntimeError, match="FP8 inputs have no backward"):
        out.sum().backward()


def test_the_published_names_of_arguments_are_the_only_ones() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        flash_attn.flash_attn_func(Q, K, V, dropout=0.1)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (99, 99)}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_what_is_not_finite_shows_in_the_output(
    argument: str, value: float, options: dict[str, Any]
) -> None:
    # A NaN that attention turned into 0 would hide a broken model.
    tensors = {"q": Q.clone(), "k": K[:, :SQ].clone(), "v": V[:, :SQ].clone()}
    tensors[argument][0, 0] = value
    out = flash_attn.flash_attn_func(**tensors, **options)
    assert not out[0, 0].isfinite().any()
    assert out[1].isfinite().all()
