"""Real transformers models, tiny and random: `flash_attention_2` gives eager's logits on the CPU,
and so does `flash_attention_3`.

The models run through transformers' own detection, unpadding and keyword handling. Only its check
that a CUDA device is there is answered for it; float32 works, though it warns that the published
kernels take half precision alone.
"""

from __future__ import annotations

import copy
import importlib.metadata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from compare import check
from oracle import attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from build_tools import stand_in

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import_utils = transformers.utils.import_utils

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # the usual 0.02 gives logits that hardly depend on attention
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}

CONFIGS = {
    "llama-gqa": transformers.LlamaConfig(**_SIZES, **_GQA),
    "mistral-window": transformers.MistralConfig(**_SIZES, **_GQA, sliding_window=5),
    "gemma2-softcap-window": transformers.Gemma2Config(
        **_SIZES,
        **_GQA,
        head_dim=24,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=4.0,
        sliding_window=6,
    ),
    "bert-bidirectional": transformers.BertConfig(
        **_SIZES, num_attention_heads=4, is_decoder=False
    ),
}
CAUSAL = [name for name in CONFIGS if "bidirectional" not in name]


def oracle_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    sliding_window: Optional[int] = None,
    softcap: Optional[float] = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of whole sequences by the oracle, as transformers calls it: (b, h, s, d)."""
    assert attention_mask is None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, _ = attention(
        q,
        k,
        v,
        softmax_scale=scaling,
        causal=module.is_causal,
        window=(-1 if sliding_window is None else sliding_window - 1, -1),
        softcap=softcap or 0.0,
    )
    return out, None


@pytest.fixture(scope="module", autouse=True)
def _detected() -> Iterator[None]:
    """transformers finds the installed distribution and believes that CUDA is there."""
    try:
        importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn is not installed, and transformers reads its metadata")
    if not import_utils.is_torch_available():
        pytest.skip("this transformers does not take this torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
        import_utils.is_flash_attn_2_available.cache_clear()
        assert import_utils.is_flash_attn_2_available()
        transformers.AttentionInterface.register("oracle", oracle_attention)
        yield
    import_utils.is_flash_attn_2_available.cache_clear()


def make(name: str, implementation: str, dtype: torch.dtype = FP32) -> Any:
    """The model of a config; equal weights whatever the implementation and dtype."""
    config = copy.deepcopy(CONFIGS[name])
    torch.manual_seed(len(name))
    auto = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModel
    model = auto.from_config(config, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    return model.to(dtype).eval()


class FlashCalls(TorchDispatchMode):
    """Names of this package's operators that run."""

    def __init__(self, namespace: str = "flash_attn") -> None:
        super().__init__()
        self.namespace = namespace
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def batch(padding: str) -> tuple[Tensor, Tensor]:
    """Token ids (3, 14) and a mask that hides some tokens on one side."""
    ids = tokens(3, 14)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :5] = 0
        mask[2, :9] = 0
    if padding == "right":
        mask[1, -5:] = 0
        mask[2, -9:] = 0
    return ids, mask


def logits(model: Any, **inputs: Any) -> Tensor:
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def padded_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the tokens that are no padding, (number of tokens, vocabulary)."""
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    return logits(model, input_ids=ids, attention_mask=mask, position_ids=positions)[mask.bool()]


def exact_logits(name: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """The same in float64, each row by itself without padding, and the model that gave them."""
    model = make(name, "oracle").to(FP64)
    rows = [row[keep.bool()][None] for row, keep in zip(ids, mask)]
    return torch.cat([logits(model, input_ids=row)[0] for row in rows]), model


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_eager(name: str, padding: str, dtype: torch.dtype) -> None:
    ids, mask = batch(padding)
    with torch.no_grad():
        with FlashCalls() as calls:
            got = padded_logits(make(name, "flash_attention_2", dtype), ids, mask)
        low = padded_logits(make(name, "eager", dtype), ids, mask)
        reference, _ = exact_logits(name, ids, mask)
    kind = "_flash_attn_forward" if padding == "none" else "_flash_attn_varlen_forward"
    assert calls.names == {kind}
    check("logits", got, reference, low)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_are_those_of_eager(name: str, padding: str) -> None:
    ids, mask = batch(padding)
    flash, eager = make(name, "flash_attention_2"), make(name, "eager")
    reference, exact = exact_logits(name, ids, mask)
    for outputs in (padded_logits(flash, ids, mask), padded_logits(eager, ids, mask), reference):
        outputs.square().mean().backward()
    for (parameter, got), low, true in zip(
        flash.named_parameters(), eager.parameters(), exact.parameters()
    ):
        check(parameter, got.grad, true.grad, low.grad)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate_gives_the_greedy_tokens_of_eager(name: str, padding: str) -> None:
    ids, mask = batch(padding)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "use_cache": True}
    with FlashCalls() as calls:
        got = make(name, "flash_attention_2").generate(ids, **options)
    expected = make(name, "eager").generate(ids, **options)
    assert torch.equal(got, expected)
    assert got.shape[1] > ids.shape[1]
    assert calls.names != set()


def test_packed_sequences_do_not_see_each_other() -> None:
    """Padding-free training: one row, positions that start again, three sequences."""
    lengths = (4, 1, 9)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    flash = make("llama-gqa", "flash_attention_2")
    with torch.no_grad():
        with FlashCalls() as calls:
            got = flash(input_ids=ids, position_ids=positions, use_cache=False).logits
        runs = []
        for model in (make("llama-gqa", "oracle").to(FP64), make("llama-gqa", "eager")):
            parts = [model(input_ids=part).logits for part in ids.split(lengths, dim=1)]
            runs.append(torch.cat(parts, dim=1))
    assert calls.names == {"_flash_attn_varlen_forward"}
    check("logits", got, runs[0], runs[1])


def test_lengths_given_as_tensors_are_taken() -> None:
    """What data collators hand over: cumulative lengths, and longest lengths as 0-d tensors."""
    lengths = (4, 1, 9)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, 4, 5, 14], dtype=torch.int32)
    longest = cu_seqlens.diff().max()
    flash = make("llama-gqa", "flash_attention_2")
    with torch.no_grad():
        expected = flash(input_ids=ids, position_ids=positions, use_cache=False).logits
        got = flash(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        ).logits
    assert torch.equal(got, expected)


@pytest.fixture
def stands_in(tmp_path: Path) -> Iterator[None]:
    """transformers finds FlashAttention-3's distribution, which stands for this package."""
    name = tmp_path / stand_in.FILE
    name.write_bytes(stand_in.wheel())
    lookups = import_utils._package_distribution_mapping, import_utils.is_flash_attn_3_available
    with pytest.MonkeyPatch.context() as patch:
        with zipfile.ZipFile(name) as archive:
            archive.extractall(tmp_path)
        patch.syspath_prepend(str(tmp_path))
        for lookup in lookups:
            lookup.cache_clear()
        yield
    for lookup in lookups:
        lookup.cache_clear()


@pytest.mark.skipif(
    not hasattr(import_utils, "_package_distribution_mapping"),
    reason="this transformers looks for FlashAttention-3 in another way",
)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_flash_attention_3_has_the_logits_of_eager(
    name: str, padding: str, stands_in: None
) -> None:
    ids, mask = batch(padding)
    with torch.no_grad():
        with FlashCalls("flash_attn_3") as calls:
            got = padded_logits(make(name, "flash_attention_3"), ids, mask)
        low = padded_logits(make(name, "eager"), ids, mask)
        reference, _ = exact_logits(name, ids, mask)
    assert calls.names == {"_flash_attn_forward"}
    check("logits", got, reference, low)
