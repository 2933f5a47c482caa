"""Run a row through the oracle or through the published functions, and compare the two."""

from __future__ import annotations

from typing import Any, Optional

import torch
from cache_problem import CacheProblem
from compare import check, poisoned_memory
from oracle import attention, kvcache_attention, varlen_attention
from problem_types import FP8, FP64, Problem, Tensors
from torch import Tensor

Results = dict[str, Tensor]

_LEAF_NAMES = {
    "separate": ("q", "k", "v"),
    "kv": ("q", "kv"),
    "qkv": ("qkv",),
    "qkvheads": ("qkv",),
}
_FUNCTION_PREFIX = {
    "separate": "",
    "kv": "kvpacked_",
    "qkv": "qkvpacked_",
    "qkvheads": "qkvpacked_",
}


def _with_gradients(problem: Problem, leaves: Any, out: Tensor, lse: Tensor, dout: Any) -> Results:
    results = {"out": out.detach(), "lse": lse.detach()}
    if dout is not None:
        gradients = torch.autograd.grad(out, leaves, dout)
        names = [f"d{name}" for name in _LEAF_NAMES[problem.packing]]
        results.update(zip(names, gradients))
    return results


def oracle_results(
    problem: Problem,
    tensors: Tensors,
    dtype: torch.dtype,
    *,
    backward: bool = True,
    dropout_mask: Optional[Tensor] = None,
    p_dtype: Optional[torch.dtype] = None,
) -> Results:
    """out, lse and the gradient of every leaf, by the oracle in `dtype`, from CPU tensors."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors.leaves]
    options = {
        "softmax_scale": problem.softmax_scale,
        "causal": problem.causal,
        "window": problem.window,
        "softcap": problem.softcap,
        "alibi_slopes": tensors.alibi_slopes,
        "attention_chunk": problem.attention_chunk,
        "qv": tensors.qv,
        "dropout_mask": dropout_mask,
        "dropout_p": problem.dropout_p,
        "dtype": dtype,
        "p_dtype": p_dtype,
        **tensors.descales,
    }
    with torch.set_grad_enabled(backward):
        q, k, v = problem.split(leaves)
        if problem.is_varlen:
            options.update(seqused_q=tensors.seqused_q, seqused_k=tensors.seqused_k)
            out, lse = varlen_attention(
                q, k, v, tensors.cu_seqlens_q, tensors.cu_seqlens_k, **options
            )
        else:
            out, lse = attention(q, k, v, **options)
    dout = tensors.dout.to(dtype) if backward else None
    return _with_gradients(problem, leaves, out, lse, dout)


def _sequence_arguments(problem: Problem, tensors: Tensors) -> tuple:
    if not problem.is_varlen:
        return ()
    if problem.packing == "qkv":
        return tensors.cu_seqlens_q, problem.sq
    return tensors.cu_seqlens_q, tensors.cu_seqlens_k, problem.sq, problem.sk


def _options(problem: Problem, tensors: Tensors, is_fa3: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "softmax_scale": problem.softmax_scale,
        "causal": problem.causal,
        "window_size": problem.window,
        "softcap": problem.softcap,
        "deterministic": problem.deterministic,
        "return_attn_probs": True,
    }
    if not is_fa3:
        return {
            **options,
            "dropout_p": problem.dropout_p,
            "alibi_slopes": tensors.alibi_slopes,
        }
    options.update(tensors.descales)
    if problem.packing == "qkvheads":
        return {**options, "num_heads_q": problem.hq}
    if problem.packing == "separate":
        options.update(attention_chunk=problem.attention_chunk, qv=tensors.qv)
    if problem.is_varlen:
        options.update(seqused_q=tensors.seqused_q, seqused_k=tensors.seqused_k)
    return options


def has_bits_of(x: Tensor, kept: Tensor) -> bool:
    """Whether two tensors are the same bits, NaN too."""
    return torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in (x, kept)))


def published_results(
    problem: Problem, tensors: Tensors, module: Any, *, backward: bool = True
) -> Results:
    """The same results from `module`'s published function (`flash_attn`, or the FA3 names).

    Fresh memory holds NaN while it runs, and the inputs must come back unchanged.
    """
    kind = "varlen_" if problem.is_varlen else ""
    function = getattr(module, f"flash_attn_{kind}{_FUNCTION_PREFIX[problem.packing]}func")
    options = _options(problem, tensors, is_fa3=module.__name__ == "flash_attn_interface")
    leaves = [x.detach().requires_grad_(backward) for x in tensors.leaves]
    before = [x.detach().clone() for x in (*leaves, tensors.dout)]
    with poisoned_memory():
        out, lse, *rest = function(*leaves, *_sequence_arguments(problem, tensors), **options)
        results = _with_gradients(problem, leaves, out, lse, tensors.dout if backward else None)
    if rest:
        results["S_dmask"] = rest[0]
    for x, kept in zip((*leaves, tensors.dout), before):
        assert has_bits_of(x, kept), f"{problem}: the call changed an input"
    return results


def assert_types(problem: Problem, tensors: Tensors, got: Results) -> None:
    """Results have the published dtypes, the gradients those of their leaves."""
    wide = FP64 if problem.dtype == FP64 else torch.float32
    assert got["out"].dtype == problem.low_dtype, got["out"].dtype
    assert got["lse"].dtype == wide, got["lse"].dtype
    for name, leaf in zip(_LEAF_NAMES[problem.packing], tensors.leaves):
        if f"d{name}" in got:
            assert got[f"d{name}"].dtype == leaf.dtype, (name, got[f"d{name}"].dtype)


def assert_follows_rule(
    problem: Problem,
    got: Results,
    *,
    backward: bool = True,
    dropout_mask: Optional[Tensor] = None,
) -> None:
    """Every result of `got` against the oracle, by the tolerance rule."""
    tensors = problem.tensors("cpu")
    # GPUs multiply FP8 values by FP8 probabilities.
    p_dtype = FP8 if problem.dtype == FP8 and got["out"].is_cuda else None
    runs = [
        oracle_results(
            problem, tensors, dtype, backward=backward, dropout_mask=dropout_mask, p_dtype=rounded
        )
        for dtype, rounded in ((FP64, None), (problem.low_dtype, p_dtype))
    ]
    for name, reference in runs[0].items():
        check(f"{problem} {name}", got[name], reference, runs[1][name])


def oracle_cache_results(problem: CacheProblem, dtype: torch.dtype) -> Results:
    """out, lse and both caches after the append, by the oracle in `dtype`."""
    tensors = {
        name: x.to(dtype) if x.dtype in (problem.dtype, problem.cache_dtype) else x
        for name, x in problem.tensors("cpu").items()
    }
    out, lse, k_cache, v_cache = kvcache_attention(
        **tensors,
        softmax_scale=problem.softmax_scale,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
        attention_chunk=problem.attention_chunk,
        rotary_interleaved=problem.interleaved,
        dtype=dtype,
    )
    return {"out": out, "lse": lse, "k_cache": k_cache, "v_cache": v_cache}


def published_cache_results(problem: CacheProblem, device: str, module: Any) -> Results:
    """The same from `module.flash_attn_with_kvcache`; `module` is `flash_attn` or the FA3 names."""
    tensors = problem.tensors(device)
    if problem.scalar_seqlen:
        tensors["cache_seqlens"] = problem.seqlens[0]
    options: dict[str, Any] = {}
    if module.__name__ == "flash_attn_interface":
        if "block_table" in tensors:
            tensors["page_table"] = tensors.pop("block_table")
        options["attention_chunk"] = problem.attention_chunk
        if problem.lens_q is not None:
            options["max_seqlen_q"] = max(problem.lens_q)
    with poisoned_memory():
        out, lse, *_ = module.flash_attn_with_kvcache(
            **tensors,
            **options,
            softmax_scale=problem.softmax_scale,
            causal=problem.causal,
            window_size=problem.window,
            softcap=problem.softcap,
            rotary_interleaved=problem.interleaved,
            num_splits=problem.num_splits,
            return_softmax_lse=True,
        )
    caches = {name: tensors[name] for name in ("k_cache", "v_cache")}
    return {"out": out, "lse": lse, **caches}


def assert_cache_follows_rule(problem: CacheProblem, got: Results) -> None:
    """out, lse and the appended caches against the oracle, by the tolerance rule."""
    runs = [oracle_cache_results(problem, dtype) for dtype in (FP64, problem.low_dtype)]
    for name, reference in runs[0].items():
        check(f"{problem} {name}", got[name], reference, runs[1][name])
