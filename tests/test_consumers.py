"""The contact surface of the projects that build on the published package.

Each test calls as its project does (argument order, keywords, strides, what it reads of the result)
without importing the project; where the numbers matter, the oracle judges them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from compare import check
from consumers import FP32, PRIVATE, SCALE, agrees, dense, gradients_agree, starts_of, tensors
from oracle import attention, kvcache_attention, varlen_attention
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn
import flash_attn_interface as fa3
from flash_attn import flash_attn_interface as fa2

# --- What they import ---------------------------------------------------------------------------


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
    ("ring-flash-attn", "flash_attn.flash_attn_interface", PRIVATE),
    ("yunchang", "flash_attn.flash_attn_interface", PRIVATE[:2]),
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
        ["flash_attn_func", "flash_attn_varlen_func", *PRIVATE],
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
    (
        "TransformerEngine",
        "flash_attn_3.flash_attn_interface",
        [
            "flash_attn_func",
            "flash_attn_varlen_func",
            "flash_attn_with_kvcache",
            "_flash_attn_forward",
            "_flash_attn_backward",
        ],
    ),
    (
        "Megatron",
        "flash_attn_3.flash_attn_interface",
        ["_flash_attn_forward", "flash_attn_with_kvcache"],
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
    ("OpenRLHF", "flash_attn.utils.distributed", ["all_gather"]),
    ("OmniGen2", "flash_attn.ops.activations", ["swiglu"]),
    ("HyenaDNA", "flash_attn.modules.mlp", ["Mlp", "FusedMLP", "ParallelFusedMLP"]),
    ("HyenaDNA", "flash_attn.modules.block", ["Block"]),
    (
        "HyenaDNA",
        "flash_attn.modules.embedding",
        ["GPT2Embeddings", "ParallelGPT2Embeddings"],
    ),
    ("HyenaDNA", "flash_attn.utils.distributed", ["sync_shared_params", "all_gather_raw"]),
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


def test_pytorch_core_runs_the_fa3_operators_by_its_own_code() -> None:
    """What `torch.nn.attention.activate_flash_attention_impl("FA3")` puts under SDPA."""
    core = pytest.importorskip("torch.nn.attention._fa3")
    core._fa3_import_module("flash_attn_interface")
    q, k, v = dense(hk=2)
    out, lse = core._fa3_run_forward(
        q, k, v, None, None, 12, 12, SCALE, True, None, None, None
    )  # fmt: skip
    agrees(out, attention, q, k, v, softmax_scale=SCALE, causal=True)
    dout = torch.ones_like(out)
    grads = core._fa3_run_backward(
        dout, q, k, v, out, lse, None, None, 12, 12, SCALE, True, -1, -1
    )  # fmt: skip
    gradients_agree(grads, dout, [q, k, v], softmax_scale=SCALE, causal=True)


def test_the_package_of_flash_attention_3_is_the_module() -> None:
    package = importlib.import_module("flash_attn_3.flash_attn_interface")
    names = [name for name in dir(fa3) if name.startswith(("flash", "_flash", "get_"))]
    assert len(names) >= 8
    missing = [name for name in names if getattr(package, name, None) is not getattr(fa3, name)]
    assert missing == []


def test_importing_the_extension_registers_the_operators() -> None:
    """As xformers finds it; in a process of its own, because this one has imported the module."""
    program = """
import importlib.util
import torch
assert importlib.util.find_spec("flash_attn_3") and importlib.util.find_spec("flash_attn_3._C")
assert not hasattr(torch.ops.flash_attn_3, "fwd")
import flash_attn_3._C
q = torch.randn(1, 5, 2, 16)
print(len(torch.ops.flash_attn_3.fwd(q, q, q)), flash_attn_3.__version__)
"""
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.stdout.split() == ["4", "3.0.0"], child.stderr


BESIDE_ANOTHER_FLASH_ATTENTION_3 = """
import torch
other = torch.library.Library("flash_attn_3", "DEF")
for name in ("fwd", "bwd", "fwd_combine", "get_scheduler_metadata"):
    other.define(f"{name}(Tensor theirs) -> Tensor")
import flash_attn_interface as fa3
for name in ("fwd", "bwd", "fwd_combine", "get_scheduler_metadata"):
    assert getattr(torch.ops.flash_attn_3, name).default._schema.arguments[0].name == "theirs"
q, k, v = torch.randn(3, 2, 9, 2, 16, requires_grad=True)
out = fa3.flash_attn_func(q, k, v, causal=True)
assert torch.autograd.grad(out.sum(), v)[0].shape == v.shape
q, k, v = q.detach(), k.detach(), v.detach()
into = torch.empty_like(q)
assert fa3._flash_attn_forward(q, k, v, out_=into, causal=True)[0] is not None
assert torch.equal(into, out)
lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)[1].transpose(1, 2).contiguous()
merged = fa3.flash_attn_combine(q[None], lse[None], into)[0]
assert torch.allclose(merged, q) and torch.equal(merged, into)
lengths = torch.tensor([9, 9], dtype=torch.int32)
assert fa3.get_scheduler_metadata(2, 1, 9, 2, 2, 16, lengths).tolist() == [1, 1]
"""


def test_another_copy_of_fa3s_extension_may_be_loaded_first() -> None:
    """xformers has one, and registers the same names."""
    subprocess.run([sys.executable, "-c", BESIDE_ANOTHER_FLASH_ATTENTION_3], check=True)


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
