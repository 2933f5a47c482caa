"""The contact surface of the projects that build on the published package.

Each test calls as its project does (argument order, keywords, strides, what it reads of the result)
without importing the project; where the numbers matter, the oracle judges them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import check
from oracle import attention, kvcache_attention, varlen_attention
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn
import flash_attn_interface as fa3
from flash_attn import flash_attn_interface as fa2

FP32 = torch.float32
SCALE = 0.25


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def dense(b: int = 2, s: int = 12, hq: int = 4, hk: int = 2, d: int = 16) -> list[Tensor]:
    return tensors((b, s, hq, d), (b, s, hk, d), (b, s, hk, d))


def starts_of(*lengths: int) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def agrees(got: Tensor, oracle: Callable[..., Any], *args: Any, **options: Any) -> None:
    """`got` against the oracle's first result, by the tolerance rule."""
    runs = [oracle(*args, **options, dtype=dtype)[0] for dtype in (torch.float64, FP32)]
    check("out", got, runs[0], runs[1])


def gradients_agree(got: list[Tensor], dout: Tensor, inputs: list[Tensor], **options: Any) -> None:
    """dq, dk, dv against the oracle's, by the tolerance rule."""
    runs = []
    for dtype in (torch.float64, FP32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, _ = attention(*leaves, **options, dtype=dtype)
        runs.append(torch.autograd.grad(out, leaves, dout.to(dtype)))
    for name, *three in zip(("dq", "dk", "dv"), got, *runs):
        check(name, *three)


# --- What they import ---------------------------------------------------------------------------

_PRIVATE = [
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
]

IMPORTS = [
    (
        "transformers",
        "flash_attn",
        ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"],
    ),
    ("transformers", "flash_attn.bert_padding", ["pad_input", "unpad_input", "index_first_axis"]),
    ("transformers", "flash_attn.layers.rotary", ["apply_rotary_emb"]),
    ("diffusers", "flash_attn", ["flash_attn_func", "flash_attn_varlen_func"]),
    (
        "diffusers",
        "flash_attn.flash_attn_interface",
        ["_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward"],
    ),
    ("diffusers", "flash_attn_interface", ["flash_attn_func", "flash_attn_varlen_func"]),
    ("ring-flash-attn", "flash_attn.flash_attn_interface", _PRIVATE),
    ("yunchang", "flash_attn.flash_attn_interface", _PRIVATE[:2]),
    (
        "yunchang",
        "flash_attn_interface",
        ["_flash_attn_forward", "_flash_attn_backward", "flash_attn_func"],
    ),
    ("xformers", "flash_attn.flash_attn_interface", ["flash_attn_gpu"]),
    ("TransformerEngine", "flash_attn_2_cuda", ["varlen_bwd"]),
    (
        "TransformerEngine",
        "flash_attn.flash_attn_interface",
        ["flash_attn_func", "flash_attn_varlen_func", *_PRIVATE],
    ),
    (
        "TransformerEngine",
        "flash_attn_interface",
        [
            "flash_attn_func",
            "flash_attn_varlen_func",
            "flash_attn_with_kvcache",
            "_flash_attn_forward",
            "_flash_attn_backward",
        ],
    ),
    ("Megatron", "flash_attn", ["flash_attn_varlen_func", "flash_attn_with_kvcache"]),
    ("Megatron", "flash_attn.layers.rotary", ["apply_rotary_emb"]),
    ("mamba", "flash_attn", ["flash_attn_with_kvcache"]),
    ("mamba", "flash_attn.layers.rotary", ["RotaryEmbedding"]),
    (
        "verl",
        "flash_attn.bert_padding",
        ["index_first_axis", "pad_input", "rearrange", "unpad_input"],
    ),
    ("axolotl", "flash_attn.flash_attn_interface", ["flash_attn_varlen_qkvpacked_func"]),
    ("nanotron", "flash_attn.modules.mha", ["flash_attn_varlen_kvpacked_func"]),
    ("H3", "flash_attn.modules.mha", ["MHA", "_update_kv_cache", "FlashSelfAttention"]),
    ("scGPT", "flash_attn.flash_attention", ["FlashMHA"]),
]


@pytest.mark.parametrize(
    ("module", "names"), [row[1:] for row in IMPORTS], ids=[f"{r[0]}:{r[1]}" for r in IMPORTS]
)
def test_names_that_are_imported_exist(module: str, names: list[str]) -> None:
    found = vars(importlib.import_module(module))
    assert [name for name in names if name not in found] == []


VERSION_WINDOWS = [
    ("transformers", ">=2.3.3"),
    ("TransformerEngine", ">=2.1.1,<=2.8.3"),
    ("TransformerEngine-sm100", ">=2.7.3,<=2.8.3"),
    ("xformers", ">=2.7.1,<=2.8.4"),
    ("diffusers", ">=2.6.3"),
    ("Megatron", ">=2.7.3"),
    ("verl", "==2.8.3"),
    ("axolotl", "==2.8.3"),
]


@pytest.mark.parametrize(
    "window", [row[1] for row in VERSION_WINDOWS], ids=[row[0] for row in VERSION_WINDOWS]
)
def test_version_lies_in_the_window(window: str) -> None:
    # `Version`, not only the specifier: 2.8.3+local would satisfy `<=2.8.3` but compare greater.
    assert Version(flash_attn.__version__) in SpecifierSet(window)
    assert Version(flash_attn.__version__) <= Version("2.8.3")


def test_yunchang_compares_versions_as_text() -> None:
    assert not flash_attn.__version__ < "2.6.3"


# --- transformers -------------------------------------------------------------------------------


def test_transformers_finds_module_and_parameters() -> None:
    assert importlib.util.find_spec("flash_attn") is not None
    varlen = inspect.signature(flash_attn.flash_attn_varlen_func).parameters
    cached = inspect.signature(flash_attn.flash_attn_with_kvcache).parameters
    for name in ("window_size", "softcap", "block_table"):
        assert name in varlen
        assert name in cached
    for name in ("dropout_p", "deterministic", "max_seqlen_q", "max_seqlen_k"):
        assert name in varlen
        assert name not in cached
    assert "cache_seqlens" in cached
    # These would make it pass attention sinks, which the published package does not know.
    for name in ("s_aux", "learnable_sink", "page_table"):
        assert name not in varlen
        assert name not in cached


def test_transformers_calls() -> None:
    q, k, v = dense()
    options = {"causal": True, "softmax_scale": SCALE, "dropout_p": 0.0, "deterministic": False}
    out = flash_attn.flash_attn_func(q, k, v, **options, window_size=(3, 3), softcap=5.0)
    assert isinstance(out, Tensor)
    oracle_options = {"causal": True, "softmax_scale": SCALE}
    agrees(out, attention, q, k, v, window=(3, 3), softcap=5.0, **oracle_options)

    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    cu_seqlens = starts_of(9, 15)
    longest = cu_seqlens.diff().max()
    out = flash_attn.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens.clone(),
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        **options,
    )
    agrees(out, varlen_attention, q, k, v, cu_seqlens, cu_seqlens, **oracle_options)


def test_transformers_paged_decoding() -> None:
    """Continuous batching: one new token for each of n sequences, keys in pages of 256."""
    n, page, pages, h, d = 3, 256, 5, 2, 16
    q, k, v, k_cache, v_cache = tensors(
        (n, 1, 4, d), (n, 1, h, d), (n, 1, h, d), (pages, page, h, d), (pages, page, h, d)
    )
    table = torch.tensor([[4, 0], [1, 0], [2, 3]], dtype=torch.int32)
    lengths = torch.tensor([7, 0, 300], dtype=torch.int32)
    expected = {"k_cache": k_cache.clone(), "v_cache": v_cache.clone()}
    out = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        block_table=table,
        cache_seqlens=lengths,
        causal=True,
        softmax_scale=SCALE,
    )
    options = {"cache_seqlens": lengths, "block_table": table, "causal": True}
    runs = [
        kvcache_attention(
            q,
            **{name: x.clone() for name, x in expected.items()},
            k=k,
            v=v,
            softmax_scale=SCALE,
            **options,
            dtype=dtype,
        )
        for dtype in (torch.float64, FP32)
    ]
    check("out", out, runs[0][0], runs[1][0])
    assert torch.equal(k_cache[3, 300 - page], k[2, 0])


# --- diffusers ----------------------------------------------------------------------------------


def test_diffusers_forward_and_backward_by_position() -> None:
    q, k, v = dense(hk=4)
    scores = (False, -1, -1, 0.0, None)
    result = fa2._wrapped_flash_attn_forward(q, k, v, 0.0, SCALE, *scores, False)
    assert len(result) == 4
    out, lse, _, rng_state = result
    lse = lse.permute(0, 2, 1)  # kept so, and turned back for the backward
    dout = torch.ones_like(out)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    fa2._wrapped_flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.permute(0, 2, 1).contiguous(),
        *grads,
        0.0,
        SCALE,
        *scores,
        False,
        rng_state,
    )
    gradients_agree(grads, dout, [q, k, v], softmax_scale=SCALE)


def test_diffusers_forward_with_a_dropout_that_drops_nothing() -> None:
    # Older releases pass 1e-30 with return_softmax, to be given the lse.
    q, k, v = dense(hk=4)
    out, lse, s_dmask, rng_state = fa2._wrapped_flash_attn_forward(
        q, k, v, 1e-30, SCALE, False, -1, -1, 0.0, None, True
    )
    agrees(out, attention, q, k, v, softmax_scale=SCALE)
    assert not (s_dmask < 0).any()
    assert (lse.shape, rng_state.shape) == ((2, 4, 12), (2,))


def test_diffusers_calls_by_keyword_alone() -> None:
    q, k, v = dense(hk=4)
    options = {"softmax_scale": SCALE, "causal": False, "window_size": (-1, -1)}
    out, lse, *_ = flash_attn.flash_attn_func(
        q=q, k=k, v=v, dropout_p=0.0, **options, return_attn_probs=True
    )
    out_3, lse_3, *_ = fa3.flash_attn_func(
        q=q,
        k=k,
        v=v,
        **options,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=True,
    )
    assert torch.equal(out, out_3)
    assert torch.equal(lse.permute(0, 2, 1), lse_3.permute(0, 2, 1))
    cu_seqlens = starts_of(12, 12)
    lengths = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": 12,
        "max_seqlen_k": 12,
    }
    flat = {name: x.flatten(0, 1) for name, x in (("q", q), ("k", k), ("v", v))}
    packed = flash_attn.flash_attn_varlen_func(
        **flat, **lengths, dropout_p=0.0, **options, return_attn_probs=False
    )
    assert torch.equal(packed.unflatten(0, (2, -1)), out)
    packed = fa3.flash_attn_varlen_func(
        **flat, **lengths, softmax_scale=SCALE, causal=False, return_attn_probs=False
    )
    assert torch.equal(packed.unflatten(0, (2, -1)), out)


# --- ring-flash-attn, yunchang ------------------------------------------------------------------


def default_arguments(function: Any) -> dict[str, Any]:
    """As ring-flash-attn reads a function's argument names, None where there is no default."""
    if not inspect.isfunction(function):
        function = function._init_fn
    spec = inspect.getfullargspec(function)
    defaults = spec.defaults or ()
    values = (None,) * (len(spec.args) - len(defaults)) + defaults
    return {**dict(zip(spec.args, values)), "softcap": 0.0}


@pytest.mark.parametrize("name", _PRIVATE)
@pytest.mark.parametrize("module", [fa2, fa3], ids=["fa2", "fa3"])
def test_private_names_are_functions_or_custom_ops(module: Any, name: str) -> None:
    function = getattr(module, name, None)
    if module is fa3 and "varlen" in name:
        assert function is None
        return
    assert inspect.isfunction(function) or hasattr(function, "_init_fn")


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Ring attention's running merge of (out, lse) over chunks of the keys."""
    (out, lse), *others = parts
    out, lse = out.to(FP32), lse.transpose(-2, -1).unsqueeze(-1)
    for block_out, block_lse in others:
        block_lse = block_lse.transpose(-2, -1).unsqueeze(-1)
        out = out - F.sigmoid(block_lse - lse) * (out - block_out)
        lse = lse - F.logsigmoid(lse - block_lse)
    return out, lse.squeeze(-1).transpose(-2, -1)


@pytest.mark.parametrize("causal", [False, True])
def test_ring_of_two_chunks_equals_attention_over_all_keys(causal: bool) -> None:
    """The second rank of two: its own keys under the mask, the first rank's keys in full."""
    q, k, v = dense()
    k_first, v_first = tensors((2, 12, 2, 16), (2, 12, 2, 16), seed=1)
    rule = {"softmax_scale": SCALE, "alibi_slopes": None}
    window = {"window_size_left": -1, "window_size_right": -1}
    parts = []
    for step, (k_step, v_step) in enumerate(((k, v), (k_first, v_first))):
        params = default_arguments(fa2._flash_attn_forward)
        params.update(
            q=q,
            k=k_step,
            v=v_step,
            dropout_p=0,
            causal=causal and step == 0,
            return_softmax=False,
            **rule,
            **window,
        )
        outputs = fa2._flash_attn_forward(**params)
        assert len(outputs) == 4
        parts.append(outputs[:2])
    out, lse = merged(parts)
    all_k, all_v = torch.cat((k_first, k), dim=1), torch.cat((v_first, v), dim=1)
    options = {"softmax_scale": SCALE, "causal": causal}
    runs = [attention(q, all_k, all_v, **options, dtype=dtype) for dtype in (torch.float64, FP32)]
    check("out", out, runs[0][0], runs[1][0])
    check("lse", lse, runs[0][1], runs[1][1])

    dout = torch.ones_like(q)
    dq = torch.zeros_like(q)
    key_grads = []
    buffers = [torch.empty_like(x) for x in (q, k, v)]
    for step, (k_step, v_step) in enumerate(((k, v), (k_first, v_first))):
        params = default_arguments(fa2._flash_attn_backward)
        params.update(
            dout=dout,
            q=q,
            k=k_step,
            v=v_step,
            out=out,
            softmax_lse=lse,
            **dict(zip(("dq", "dk", "dv"), buffers)),
            dropout_p=0,
            causal=causal and step == 0,
            deterministic=False,
            **rule,
            **window,
        )
        fa2._flash_attn_backward(**params)
        dq += buffers[0]
        key_grads.append([x.clone() for x in buffers[1:]])
    dk, dv = (torch.cat((first, own), dim=1) for own, first in zip(*key_grads))
    gradients_agree([dq, dk, dv], dout, [q, all_k, all_v], **options)


def test_ring_varlen_by_keyword() -> None:
    q, k, v = (x.flatten(0, 1) for x in dense())
    cu_seqlens = starts_of(5, 19)
    params = default_arguments(fa2._flash_attn_varlen_forward)
    params.update(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=19,
        max_seqlen_k=19,
        dropout_p=0,
        softmax_scale=SCALE,
        causal=True,
        alibi_slopes=None,
        return_softmax=False,
    )
    out, lse, _, rng_state = fa2._flash_attn_varlen_forward(**params)
    assert lse.shape == (4, 24)
    agrees(out, varlen_attention, q, k, v, cu_seqlens, cu_seqlens, softmax_scale=SCALE, causal=True)
    # llama3's ring writes the gradients of keys into a slice of a larger buffer.
    buffer = torch.full((2, 40, 2, 16), float("nan"))
    grads = (torch.empty_like(q), buffer[0, 8:32], buffer[1, 8:32])
    params = default_arguments(fa2._flash_attn_varlen_backward)
    params.update(
        dout=torch.ones_like(out),
        q=q,
        k=k,
        v=v,
        out=out,
        softmax_lse=lse,
        **dict(zip(("dq", "dk", "dv"), grads)),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=19,
        max_seqlen_k=19,
        dropout_p=0,
        softmax_scale=SCALE,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        alibi_slopes=None,
        deterministic=True,
        rng_state=rng_state,
    )
    fa2._flash_attn_varlen_backward(**params)
    assert not any(grad.isnan().any() for grad in grads)
    assert buffer[:, :8].isnan().all()
    assert buffer[:, 32:].isnan().all()


def test_yunchang_by_keyword_and_by_position() -> None:
    q, k, v = dense()
    out, lse, _, _ = fa2._flash_attn_forward(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=SCALE,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    grads = [torch.empty_like(x) for x in (q, k, v)]
    dout = torch.ones_like(out)
    tail = (0.0, SCALE, True, -1, -1, 0.0, None, False, None)
    fa2._flash_attn_backward(dout, q, k, v, out, lse, *grads, *tail)
    gradients_agree(grads, dout, [q, k, v], softmax_scale=SCALE, causal=True)


# --- xformers -----------------------------------------------------------------------------------


def strided_gradients(q: Tensor, k: Tensor) -> list[Tensor]:
    """Views of one chunk, as xformers makes them so that no copy joins them later."""
    chunk = torch.full((*q.shape[:-2], q.shape[-2] + 2 * k.shape[-2], q.shape[-1]), float("nan"))
    return list(chunk.split((q.shape[-2], k.shape[-2], k.shape[-2]), dim=-2))


def test_xformers_dense_by_position() -> None:
    extension = fa2.flash_attn_gpu
    q, k, v = dense()
    out, lse, _, rng_state = extension.fwd(
        q, k, v, None, None, 0.0, SCALE, True, 3, 0, 0.0, False, None
    )
    options = {"softmax_scale": SCALE, "causal": True, "window": (3, 0)}
    agrees(out, attention, q, k, v, **options)
    grads = strided_gradients(q, k)
    dout = torch.ones_like(out)
    extension.bwd(
        dout, q, k, v, out, lse, *grads, None, 0.0, SCALE, True, 3, 0, 0.0, False, None, rng_state
    )
    gradients_agree(grads, dout, [q, k, v], **options)


def test_xformers_varlen_by_position() -> None:
    extension = fa2.flash_attn_gpu
    q, k, v = (x.flatten(0, 1) for x in dense())
    cu = starts_of(10, 14)
    tail = (0.0, SCALE, False, True, -1, -1, 0.0)
    out, lse, _, rng_state = extension.varlen_fwd(
        q, k, v, None, cu, cu, None, None, None, None, 14, 14, *tail, False, None
    )
    agrees(out, varlen_attention, q, k, v, cu, cu, softmax_scale=SCALE, causal=True)
    grads = strided_gradients(q, k)
    dout = torch.ones_like(out)
    extension.varlen_bwd(
        dout, q, k, v, out, lse, *grads, cu, cu, None, 14, 14, *tail, False, None, rng_state
    )
    for i, (start, stop) in enumerate(((0, 10), (10, 24))):
        rows = slice(start, stop)
        parts = [x[rows][None] for x in grads]
        inputs = [x[rows][None] for x in (q, k, v)]
        assert not parts[i].isnan().any()
        gradients_agree(parts, dout[rows][None], inputs, softmax_scale=SCALE, causal=True)


# seqstart_k, seqused_k: padded blocks; blocks with gaps; blocks that lie anywhere.
XFORMERS_KEYS = [
    ("padded", [0, 8, 16, 24], [5, 8, 1]),
    ("gaps", [0, 7, 12, 24], [6, 3, 1]),
    ("late_start", [3, 10, 16, 24], [6, 3, 8]),
    ("any_order", [16, 3, 10, 24], [8, 6, 3]),
]


@pytest.mark.parametrize(
    ("starts", "used"), [row[1:] for row in XFORMERS_KEYS], ids=[row[0] for row in XFORMERS_KEYS]
)
def test_xformers_keys_in_blocks(starts: list[int], used: list[int]) -> None:
    q, k, v = (x.flatten(0, 1) for x in dense())
    q, cu_q = q[:6], starts_of(1, 1, 4)
    cu_k, seqused = (torch.tensor(x, dtype=torch.int32) for x in (starts, used))
    out, *_ = fa2.flash_attn_gpu.varlen_fwd(
        q, k, v, None, cu_q, cu_k, seqused, None, None, None, 4, 8,
        0.0, SCALE, False, True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    keys = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, used)])
    agrees(
        out,
        varlen_attention,
        q,
        k[keys],
        v[keys],
        cu_q,
        starts_of(*used),
        softmax_scale=SCALE,
        causal=True,
    )


def test_xformers_pages_with_offsets_for_starts() -> None:
    """Paged masks: the starts are offsets with -1 at the end, and only `seqused_k` counts."""
    q, k, v = tensors((3, 4, 16), (6, 8, 2, 16), (6, 8, 2, 16))
    table = torch.tensor([[5, 1], [0, 0], [2, 4]], dtype=torch.int32)
    used = torch.tensor([9, 3, 16], dtype=torch.int32)
    out, *_ = fa2.flash_attn_gpu.varlen_fwd(
        q, k, v, None, starts_of(1, 1, 1), torch.tensor([0, 0, 0, -1], dtype=torch.int32), used,
        None, table, None, 1, 16, 0.0, SCALE, False, True, -1, -1, 0.0, False, None,
    )  # fmt: skip
    keys, values = (
        torch.cat([x[table[i].long()].flatten(0, 1)[:n] for i, n in enumerate(used.tolist())])
        for x in (k, v)
    )
    agrees(
        out,
        varlen_attention,
        q,
        keys,
        values,
        starts_of(1, 1, 1),
        starts_of(*used.tolist()),
        softmax_scale=SCALE,
        causal=True,
    )


# --- TransformerEngine --------------------------------------------------------------------------


@pytest.mark.parametrize("is_varlen", [False, True], ids=["bshd", "thd"])
def test_transformer_engine_context_parallel_calls(is_varlen: bool) -> None:
    q, k, v = dense()
    lengths: tuple[Any, ...] = ()
    forward, backward = fa2._flash_attn_forward, fa2._flash_attn_backward
    more: dict[str, Any] = {}
    if is_varlen:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu = starts_of(12, 12)
        lengths, more = (cu, cu, 12, 12), {"block_table": None}
        forward, backward = fa2._flash_attn_varlen_forward, fa2._flash_attn_varlen_backward
    shared = {
        "softmax_scale": SCALE,
        "causal": True,
        "window_size_left": -1,
        "window_size_right": 0,
        "dropout_p": 0.0,
        "alibi_slopes": None,
        "softcap": 0.0,
    }
    outputs = forward(q, k, v, *lengths, return_softmax=False, **shared, **more)
    out, lse, rng_state = outputs[0], outputs[1], outputs[3]
    grads = [torch.empty_like(x) for x in (q, k, v)]
    dout = torch.ones_like(out)
    backward(
        dout, q, k, v, out, lse, *grads, *lengths,
        deterministic=False, rng_state=rng_state, **shared,
    )  # fmt: skip
    if is_varlen:
        assert lse.shape == (4, 24)
        dout, q, k, v, *grads = (x.unflatten(0, (2, 12)) for x in (dout, q, k, v, *grads))
    gradients_agree(grads, dout, [q, k, v], softmax_scale=SCALE, causal=True)


def test_transformer_engine_public_calls() -> None:
    q, k, v = dense()
    options = {
        "softmax_scale": SCALE,
        "causal": True,
        "window_size": (-1, 0),
        "alibi_slopes": None,
        "deterministic": True,
    }
    out = fa2.flash_attn_func(q, k, v, 0.0, **options)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    cu = starts_of(12, 12)
    packed = fa2.flash_attn_varlen_func(*flat, cu, cu, 12, 12, 0.0, **options, block_table=None)
    assert torch.equal(packed.unflatten(0, (2, 12)), out)


def test_transformer_engine_fa3_calls() -> None:
    q, k, v = dense()
    options = {"softmax_scale": SCALE, "causal": True, "window_size_left": -1}
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, *[None] * 20, **options, window_size_right=0)
    agrees(out, attention, q, k, v, softmax_scale=SCALE, causal=True)
    grads = dict(zip(("dq", "dk", "dv"), (torch.empty_like(x) for x in (q, k, v))))
    fa3._flash_attn_backward(
        torch.ones_like(out),
        q,
        k,
        v,
        out,
        lse,
        **grads,
        softmax_scale=SCALE,
        is_causal=True,
        window_size_left=-1,
        window_size_right=0,
        deterministic=False,
    )
    dout = torch.ones_like(out)
    gradients_agree([*grads.values()], dout, [q, k, v], softmax_scale=SCALE, causal=True)


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


# --- PyTorch core, compilers --------------------------------------------------------------------


def test_pytorch_core_calls_the_fa3_operators_by_position() -> None:
    """Its SDPA layout is (b, h, s, d); out is a view of memory like the query's."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense(hk=4))
    out_bhsd = torch.empty_like(q.transpose(1, 2))
    result = torch.ops.flash_attn_3.fwd(
        q, k, v, None, None, None, out_bhsd.transpose(1, 2), *[None] * 5, 12, 12, *[None] * 9,
        SCALE, True, -1, -1, 0, 0.0, True, None, 1, None, 0,
    )  # fmt: skip
    assert len(result) == 4
    out, lse = result[0], result[1].contiguous()
    assert out.data_ptr() == out_bhsd.data_ptr()
    agrees(out, attention, q, k, v, softmax_scale=SCALE, causal=True)
    dout = torch.ones_like(out)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    result = torch.ops.flash_attn_3.bwd(
        dout, q, k, v, out, lse, *grads, None, None, None, None, 12, 12, SCALE, True, -1, -1, 0.0,
        False, 0,
    )  # fmt: skip
    assert len(result) == 8
    gradients_agree(grads, dout, [q, k, v], softmax_scale=SCALE, causal=True)


class SeenOperators(TorchDispatchMode):
    """Which operators run, as selective-checkpoint policies and counters see them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def test_policies_and_counters_see_the_published_operators() -> None:
    ops = torch.ops.flash_attn
    q, k, v = (x.requires_grad_() for x in dense())
    cu = starts_of(12, 12)
    with SeenOperators() as dense_mode:
        flash_attn.flash_attn_func(q, k, v).sum().backward()
    with SeenOperators() as varlen_mode:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        flash_attn.flash_attn_varlen_func(*flat, cu, cu, 12, 12).sum().backward()
    assert {ops._flash_attn_forward.default, ops._flash_attn_backward.default} <= dense_mode.seen
    expected = {ops._flash_attn_varlen_forward.default, ops._flash_attn_varlen_backward.default}
    assert expected <= varlen_mode.seen
    assert any("flash_attn" in str(op) for op in dense_mode.seen)


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
