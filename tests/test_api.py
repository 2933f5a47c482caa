"""The published API to the letter: names, order, defaults, annotations, schemas, results."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn
import flash_attn_2_cuda
import flash_attn_interface as fa3
from flash_attn import _ops, _ops_fa3, _ops_splits
from flash_attn import flash_attn_interface as fa2

# As the published packages have them; `<lengths>` and `<options>` stand for what many share.
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
OPTIONS_TEXT = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
PUBLISHED = {
    "flash_attn": """
    flash_attn_func(q, k, v, <options>)
    flash_attn_kvpacked_func(q, kv, <options>)
    flash_attn_qkvpacked_func(qkv, <options>)
    flash_attn_varlen_func(q, k, v, <lengths>, <options>, block_table=None)
    flash_attn_varlen_kvpacked_func(q, kv, <lengths>, <options>)
    flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, <options>)
    flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)
    """,
    "flash_attn.flash_attn_interface": """
    _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, return_softmax)
    _flash_attn_varlen_forward(q, k, v, <lengths>, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
        zero_tensors=False)
    _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale,
        causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None)
    _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, <lengths>, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None, zero_tensors=False)
    _get_block_size_n(device, head_dim, is_dropout, is_causal)
    maybe_contiguous(x)
    round_multiple(x, m)
    """,
    "flash_attn_interface": """
    flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None,
        k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False)
    flash_attn_varlen_func(q, k, v, <lengths>, seqused_q=None, seqused_k=None, softmax_scale=None,
        causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1,
        -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False)
    flash_attn_qkvpacked_func(qkv, softmax_scale=None, causal=False, q_descale=None,
        k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False)
    flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None,
        rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None,
        page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None,
        rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None,
        sm_margin=0, return_softmax_lse=False)
    flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None)
    get_scheduler_metadata(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv,
        headdim, cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None,
        cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0,
        causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0,
        pack_gqa=None, sm_margin=0)
    _flash_attn_forward(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None,
        cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None,
        rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
        v_descale=None, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0)
    _flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None,
        sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None,
        dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0)
    """,
    "flash_attn.modules.mlp": """
    Mlp(in_features, hidden_features=None, out_features=None, activation=gelu, bias1=True,
        bias2=True, return_residual=False, device=None, dtype=None)
    GatedMlp(in_features, hidden_features=None, out_features=None, activation=sigmoid, bias1=True,
        bias2=True, multiple_of=128, return_residual=False, device=None, dtype=None)
    """,
    "flash_attn.modules.block": """
    Block(dim, mixer_cls=None, mlp_cls=None, norm_cls=LayerNorm, dropout_cls=Dropout,
        prenorm=True, resid_dropout1=0.0, resid_dropout2=0.0, drop_path1=0.0, drop_path2=0.0,
        fused_dropout_add_ln=False, return_residual=False, residual_in_fp32=False,
        sequence_parallel=False, mark_shared_params=False)
    ParallelBlock(dim, mixer_cls=None, mlp_cls=None, norm_cls=LayerNorm, dropout_cls=Dropout,
        resid_dropout1=0.0, resid_dropout2=0.0, tied_norm=False, fused_dropout_add_ln=False,
        residual_in_fp32=False, sequence_parallel=False, mark_shared_params=False)
    """,
    "flash_attn.modules.embedding": """
    GPT2Embeddings(embed_dim, vocab_size, max_position_embeddings, padding_idx=None,
        word_embed_proj_dim=None, device=None, dtype=None)
    BertEmbeddings(embed_dim, vocab_size, max_position_embeddings, type_vocab_size,
        padding_idx=None, device=None, dtype=None)
    ParallelGPT2Embeddings(embed_dim, vocab_size, max_position_embeddings, process_group,
        padding_idx=None, sequence_parallel=True, device=None, dtype=None)
    """,
    "flash_attn.layers.patch_embed": """
    PatchEmbed(img_size=224, patch_size=16, in_chans=3, embed_dim=768, norm_layer=None,
        flatten=True, bias=True, fused_bias_fc=False)
    """,
    "flash_attn.ops.activations": """
    bias_gelu(y, bias)
    bias_gelu_back(g, y, bias)
    gelu_fwd(x)
    gelu_bwd(g, x)
    relu_bwd(g, x)
    sqrelu_fwd(x)
    sqrelu_bwd(g, x)
    swiglu_fwd(x, y)
    swiglu_bwd(x, y, g)
    """,
    "flash_attn.utils.distributed": """
    all_gather_raw(input_, process_group, async_op=False)
    reduce_scatter_raw(input_, process_group, async_op=False)
    all_reduce_raw(input_, process_group, async_op=False)
    sync_shared_params(model, process_group)
    allreduce_sequence_parallel_grad(model, process_group)
    get_dim_for_local_rank(dim, world_size, local_rank, multiple_of=1)
    """,
    # Positional in the extension module: here only order and number count.
    "flash_attn_2_cuda": """
    fwd(q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, return_softmax, gen=None)
    varlen_fwd(q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table,
        alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors,
        is_causal, window_size_left, window_size_right, softcap, return_softmax, gen=None)
    bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, p_dropout, softmax_scale,
        is_causal, window_size_left, window_size_right, softcap, deterministic, gen=None,
        rng_state=None)
    varlen_bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
        alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors,
        is_causal, window_size_left, window_size_right, softcap, deterministic, gen=None,
        rng_state=None)
    fwd_kvcache(q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx,
        leftpad_k, block_table, alibi_slopes, out, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, is_rotary_interleaved, num_splits)
    """,
}


def published_signatures() -> list[tuple[str, str, str]]:
    """(module, function, parameters) of every row above."""
    rows = []
    for module, text in PUBLISHED.items():
        text = text.replace("<lengths>", LENGTHS).replace("<options>", OPTIONS_TEXT)
        for name, parameters in re.findall(r"^    (\w+)\((.*?)\)$", text, re.M | re.S):
            rows.append((module, name, " ".join(parameters.split())))
    return rows


SIGNATURES = published_signatures()


def as_text(parameter: inspect.Parameter) -> str:
    assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, parameter
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    default = getattr(parameter.default, "__name__", repr(parameter.default))
    return f"{parameter.name}={default}"


@pytest.mark.parametrize(
    ("module", "name", "expected"), SIGNATURES, ids=[f"{m}.{n}" for m, n, _ in SIGNATURES]
)
def test_signature_is_the_published_one(module: str, name: str, expected: str) -> None:
    function = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(function).parameters.values()
    assert ", ".join(as_text(parameter) for parameter in parameters) == expected


@pytest.mark.parametrize(
    ("name", "count"),
    [("fwd", 13), ("varlen_fwd", 21), ("bwd", 19), ("varlen_bwd", 24), ("fwd_kvcache", 20)],
)
def test_extension_function_takes_the_published_number_of_arguments(name: str, count: int) -> None:
    assert len(inspect.signature(getattr(flash_attn_2_cuda, name)).parameters) == count


def test_versions_are_the_published_ones() -> None:
    assert flash_attn.__version__ == "2.8.3"


def test_the_package_exports_what_was_published() -> None:
    published = {name for module, name, _ in SIGNATURES if module == "flash_attn"}
    assert set(flash_attn.__all__) == published | {"__version__"}


MODULE_NAMES = [
    ("flash_attn.flash_attn_interface", "flash_attn_gpu"),
    ("flash_attn.flash_attn_interface", "USE_TRITON_ROCM"),
    ("flash_attn.flash_attn_interface", "_wrapped_flash_attn_forward"),
    ("flash_attn.flash_attn_interface", "_wrapped_flash_attn_varlen_forward"),
    ("flash_attn.flash_attn_interface", "_wrapped_flash_attn_backward"),
    ("flash_attn.flash_attn_interface", "_wrapped_flash_attn_varlen_backward"),
    ("flash_attn.flash_attn_interface", "_flash_attn_forward_fake"),
    ("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward_fake"),
    ("flash_attn.flash_attn_interface", "_flash_attn_backward_fake"),
    ("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward_fake"),
    ("flash_attn_interface", "flash_attn_3_cuda"),
    ("flash_attn_interface", "maybe_contiguous"),
    ("flash_attn_interface", "round_multiple"),
]


@pytest.mark.parametrize(("module", "name"), MODULE_NAMES, ids=lambda x: x)
def test_other_published_names_exist(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_the_extension_is_reachable_under_its_attribute() -> None:
    assert fa2.flash_attn_gpu is flash_attn_2_cuda
    assert fa2.USE_TRITON_ROCM is False


def test_wrapped_names_are_the_operators() -> None:
    for name in ("forward", "varlen_forward", "backward", "varlen_backward"):
        op = getattr(torch.ops.flash_attn, f"_flash_attn_{name}")
        assert getattr(fa2, f"_wrapped_flash_attn_{name}") is op


def test_small_helpers_do_what_they_did() -> None:
    x = torch.zeros(2, 3, 4)
    assert fa2.maybe_contiguous(x) is x
    assert fa2.maybe_contiguous(x.transpose(1, 2)).stride(-1) == 1
    assert fa2.maybe_contiguous(None) is None
    assert [fa2.round_multiple(n, 128) for n in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert fa2._get_block_size_n(torch.device("cpu"), 64, True, False) >= 1 << 20


# --- Operators ----------------------------------------------------------------------------------

GRADS = ("dq", "dk", "dv")
OPERATORS = [
    (_ops.FORWARD, fa2._flash_attn_forward, ()),
    (_ops.VARLEN_FORWARD, fa2._flash_attn_varlen_forward, ()),
    (_ops.BACKWARD, fa2._flash_attn_backward, GRADS),
    (_ops.VARLEN_BACKWARD, fa2._flash_attn_varlen_backward, GRADS),
    (_ops_fa3.FORWARD, fa3._flash_attn_forward, ()),
    (_ops_fa3.BACKWARD, fa3._flash_attn_backward, GRADS),
]


def operator(name: str) -> Any:
    namespace, short_name = name.split("::")
    return getattr(getattr(torch.ops, namespace), short_name).default


def comparable(schema: Any) -> str:
    """A schema as text, alias sets numbered by position: their letters mean nothing."""
    count = iter(range(100))
    return re.sub(r"\((\w+)!\)", lambda match: f"(alias{next(count)}!)", str(schema))


@pytest.mark.skipif(
    not hasattr(torch.library, "infer_schema"),
    reason="torch 2.5 brought torch.library.infer_schema",
)
@pytest.mark.parametrize(("name", "function", "mutated"), OPERATORS, ids=[r[0] for r in OPERATORS])
def test_operator_has_the_schema_torch_infers_from_the_published_function(
    name: str, function: Callable[..., Any], mutated: tuple[str, ...]
) -> None:
    # The published packages hand exactly these functions to torch.library.custom_op.
    schema = torch.library.infer_schema(function, mutates_args=mutated)
    expected = torch._C.parse_schema(name + schema)
    assert comparable(operator(name)._schema) == comparable(expected)


SCHEMAS = {**_ops.SCHEMAS, **_ops_fa3.SCHEMAS, **_ops_splits.SCHEMAS}


@pytest.mark.parametrize("name", SCHEMAS)
def test_operator_is_registered_with_the_schema_written_down(name: str) -> None:
    assert str(operator(name)._schema) == str(torch._C.parse_schema(name + SCHEMAS[name]))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (_ops.FORWARD, []),
        (_ops.VARLEN_FORWARD, []),
        (_ops.BACKWARD, ["dq", "dk", "dv"]),
        (_ops.VARLEN_BACKWARD, ["dq", "dk", "dv"]),
        (_ops.WITH_KVCACHE, ["k_cache", "v_cache"]),
        (_ops_fa3.FORWARD, []),
        (_ops_fa3.BACKWARD, ["dq", "dk", "dv"]),
        (_ops_fa3.BWD, ["dq", "dk", "dv"]),
    ],
    ids=lambda x: x if isinstance(x, str) else ".".join(x),
)
def test_operator_declares_what_it_writes(name: str, written: list[str]) -> None:
    arguments = operator(name)._schema.arguments
    assert [a.name for a in arguments if a.alias_info and a.alias_info.is_write] == written


# xformers and PyTorch's core compare or call these by position.
FA3_EXTENSION = {
    ("fwd", 4): """
        q, k, v, k_new, v_new, q_v, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
        rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, is_causal,
        window_size_left, window_size_right, attention_chunk, softcap, is_rotary_interleaved,
        scheduler_metadata, num_splits, pack_gqa, sm_margin
    """,
    ("bwd", 8): """
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, deterministic, sm_margin
    """,
    ("fwd_combine", 2): """
        out_partial, lse_partial, out, out_dtype
    """,
}


@pytest.mark.parametrize(("name", "returns"), FA3_EXTENSION, ids=[row[0] for row in FA3_EXTENSION])
def test_fa3_extension_schema_is_the_published_one(name: str, returns: int) -> None:
    schema = operator(f"flash_attn_3::{name}")._schema
    arguments = FA3_EXTENSION[name, returns].split()
    assert ", ".join(argument.name for argument in schema.arguments) == " ".join(arguments)
    assert len(schema.returns) == returns


# --- Tensors in place of numbers ----------------------------------------------------------------


def dense(b: int = 2, s: int = 9, h: int = 2, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b * s * h * d)
    return tuple(torch.randn(3, b, s, h, d, generator=generator).unbind(0))


def packed(lengths: tuple[int, ...] = (3, 0, 6)) -> tuple[tuple[Tensor, ...], Tensor]:
    q, k, v = (x[0] for x in dense(1, sum(lengths)))
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return (q, k, v), torch.tensor(starts, dtype=torch.int32)


def test_window_size_may_hold_0d_tensors() -> None:
    q, k, v = dense()
    expected = flash_attn.flash_attn_func(q, k, v, window_size=(3, 1))
    window = torch.tensor([3, 1])
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=window), expected)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=(3, window[1])), expected)
    kvcache = flash_attn.flash_attn_with_kvcache(q, k, v, window_size=window)
    assert torch.equal(kvcache, expected)


def test_max_seqlen_may_be_a_0d_tensor() -> None:
    (q, k, v), cu_seqlens = packed()
    expected = flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 6, 6)
    longest = cu_seqlens.diff().max()
    got = flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    assert torch.equal(got, expected)


def test_backward_works_with_0d_tensors_for_numbers() -> None:
    (q, k, v), cu_seqlens = packed()
    longest, window = cu_seqlens.diff().max(), torch.tensor([2, 2])
    grads = []
    for numbers in ((6, 6, (2, 2)), (longest, longest, window)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        lengths = (cu_seqlens, cu_seqlens, *numbers[:2])
        out = flash_attn.flash_attn_varlen_func(*leaves, *lengths, window_size=numbers[2])
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, expected in zip(*grads):
        assert torch.equal(got, expected)


def test_private_operators_take_ints_for_floats_and_tensors_for_ints() -> None:
    q, k, v = dense()
    left = torch.tensor(3)
    got = fa2._flash_attn_forward(q, k, v, 0, 1, False, left, left, 0, None, False)
    expected = fa2._flash_attn_forward(q, k, v, 0.0, 1.0, False, 3, 3, 0.0, None, False)
    assert torch.equal(got[0], expected[0])


# --- Autograd classes ---------------------------------------------------------------------------

# Every option differs from its default, so no two places may be swapped.
SLOPES = torch.tensor([0.1, 0.25])
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": 0.3,
    "causal": True,
    "window_size": (4, 2),
    "softcap": 5.0,
    "alibi_slopes": SLOPES,
    "deterministic": True,
    "return_attn_probs": True,
}


def class_rows() -> list[tuple[str, str, tuple[Any, ...], tuple[Any, ...]]]:
    q, k, v = dense()
    kv, qkv = torch.stack((k, v), dim=2), torch.stack((q, k, v), dim=2)
    (pq, pk, pv), cu = packed()
    pkv, pqkv = torch.stack((pk, pv), dim=1), torch.stack((pq, pk, pv), dim=1)
    lengths = (cu, cu, 6, 6)
    return [
        ("FlashAttnFunc", "func", (q, k, v), ()),
        ("FlashAttnKVPackedFunc", "kvpacked_func", (q, kv), ()),
        ("FlashAttnQKVPackedFunc", "qkvpacked_func", (qkv,), ()),
        ("FlashAttnVarlenFunc", "varlen_func", (pq, pk, pv, *lengths), (None,)),
        ("FlashAttnVarlenKVPackedFunc", "varlen_kvpacked_func", (pq, pkv, *lengths), ()),
        ("FlashAttnVarlenQKVPackedFunc", "varlen_qkvpacked_func", (pqkv, cu, 6), ()),
    ]


CLASS_ROWS = class_rows()


@pytest.mark.parametrize(
    ("class_name", "name", "args", "more"), CLASS_ROWS, ids=lambda x: str(x)[:28]
)
def test_autograd_class_takes_the_published_positions(
    class_name: str, name: str, args: tuple[Any, ...], more: tuple[Any, ...]
) -> None:
    expected = getattr(flash_attn, f"flash_attn_{name}")(*args, **OPTIONS)
    apply = getattr(fa2, class_name).apply
    got = apply(*args, *OPTIONS.values(), *more, torch.is_grad_enabled())
    assert [torch.equal(a, b) for a, b in zip(got, expected)] == [True] * 3


def test_autograd_class_obeys_its_gradient_flag() -> None:
    q, k, v = (x.clone().requires_grad_() for x in dense())
    out, _, _ = fa2.FlashAttnFunc.apply(q, k, v, *OPTIONS.values(), True)
    assert all(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
    out, _, _ = fa2.FlashAttnFunc.apply(q, k, v, *OPTIONS.values(), False)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(out.sum(), (q, k, v))


def test_private_operators_refuse_to_be_differentiated() -> None:
    # A gradient that silently stays None would be worse than no gradient at all.
    q, k, v = (x.clone().requires_grad_() for x in dense())
    out, _, _, _ = fa2._flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)
    with pytest.raises(RuntimeError):
        out.sum().backward()


# --- Results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(
    ("class_name", "name", "args", "more"), CLASS_ROWS, ids=lambda x: str(x)[:28]
)
def test_result_is_out_or_a_triple(
    class_name: str, name: str, args: tuple[Any, ...], more: tuple[Any, ...], dropout_p: float
) -> None:
    function = getattr(flash_attn, f"flash_attn_{name}")
    out = function(*args, dropout_p)
    assert isinstance(out, Tensor)
    result = function(*args, dropout_p, return_attn_probs=True)
    assert isinstance(result, tuple)
    out, lse, s_dmask = result
    is_varlen = "Varlen" in class_name
    assert out.shape == ((9, 2, 16) if is_varlen else (2, 9, 2, 16))
    assert lse.shape == ((2, 9) if is_varlen else (2, 2, 9))
    assert lse.dtype == torch.float32
    b = 3 if is_varlen else 2
    assert s_dmask.shape == ((b, 2, 128, 128) if dropout_p else (0,))
    assert s_dmask.dtype == out.dtype


def test_kvcache_result_is_out_or_a_pair() -> None:
    q, k, v = dense()
    out = flash_attn.flash_attn_with_kvcache(q, k, v)
    assert isinstance(out, Tensor)
    assert out.shape == q.shape
    result = flash_attn.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    assert isinstance(result, tuple)
    assert [x.shape for x in result] == [(2, 9, 2, 16), (2, 2, 9)]


def test_fa3_results_are_a_pair_and_a_quadruple() -> None:
    q, k, v = dense()
    assert isinstance(fa3.flash_attn_func(q, k, v), Tensor)
    pair = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    assert [x.shape for x in pair] == [(2, 9, 2, 16), (2, 2, 9)]
    four = fa3.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    assert [x.shape for x in four] == [(2, 9, 2, 16), (2, 2, 9), (0,), (0,)]
    qkv = torch.stack((q, k, v), dim=2)
    assert len(fa3.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)) == 2
    (pq, pk, pv), cu = packed()
    pair = fa3.flash_attn_varlen_func(pq, pk, pv, cu, cu, 6, 6, return_attn_probs=True)
    assert [x.shape for x in pair] == [(9, 2, 16), (2, 9)]


def test_private_results_have_the_published_shapes() -> None:
    q, k, v = dense()
    scale = (0.25, False, -1, -1, 0.0, None)
    out, lse, s_dmask, rng_state = fa2._flash_attn_forward(q, k, v, 0.1, *scale, True)
    assert [x.shape for x in (out, lse, s_dmask)] == [q.shape, (2, 2, 9), (2, 2, 128, 128)]
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.int64)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    softmax_d = fa2._flash_attn_backward(
        out, q, k, v, out, lse, *grads, 0.1, *scale, False, rng_state
    )
    assert (softmax_d.shape, softmax_d.dtype) == ((2, 2, 128), torch.float32)

    (q, k, v), cu = packed()
    lengths = (cu, cu, 6, 6)
    out, lse, s_dmask, rng_state = fa2._flash_attn_varlen_forward(
        q, k, v, *lengths, 0.0, 0.25, True
    )
    assert [x.shape for x in (out, lse, s_dmask)] == [(9, 2, 16), (2, 9), (0,)]
    grads = [torch.empty_like(x) for x in (q, k, v)]
    scores = (0.25, True, -1, -1, 0.0, None)
    softmax_d = fa2._flash_attn_varlen_backward(
        out, q, k, v, out, lse, *grads, *lengths, 0.0, *scores, False
    )
    assert softmax_d.shape == (2, 9 + 128 * 3)


def test_extension_results_are_lists() -> None:
    q, k, v = dense()
    tail = (0.25, True, -1, -1, 0.0)
    result = flash_attn_2_cuda.fwd(q, k, v, None, None, 0.0, *tail, False, None)
    assert isinstance(result, list)
    out, lse, _, rng_state = result
    given = torch.empty_like(q)
    assert flash_attn_2_cuda.fwd(q, k, v, given, None, 0.0, *tail, False, None)[0] is given
    assert torch.equal(given, out)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    result = flash_attn_2_cuda.bwd(
        out, q, k, v, out, lse, *grads, None, 0.0, *tail, False, None, rng_state
    )
    assert [a is b for a, b in zip(result, grads)] == [True] * 3
    without = flash_attn_2_cuda.bwd(
        out, q, k, v, out, lse, None, None, None, None, 0.0, *tail, False, None, rng_state
    )
    assert [torch.equal(a, b) for a, b in zip(without, result)] == [True] * 4
    assert (
        len(
            flash_attn_2_cuda.fwd_kvcache(
                q, k, v, None, None, None, None, None, None, None, None, None, given, *tail, True, 0
            )
        )
        == 2
    )
