"""The KV cache of one attention layer, in `InferenceParams.key_value_memory_dict`."""

from __future__ import annotations

from torch import Tensor

from flash_attn.utils.generation import InferenceParams


def layer_cache(kv: Tensor, inference_params: InferenceParams, layer_idx: int | None) -> Tensor:
    """The cache rows of this call's batch, (b, max_seqlen, 2, hk, d); made on first use.

    kv: what is to be appended, (b, s, 2, hk, d). Raises ValueError when it does not fit.
    """
    if layer_idx is None:
        raise ValueError("KV cache: layer_idx is None; generation requires layer_idx in the layer")
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        shape = (inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:])
        caches[layer_idx] = kv.new_empty(shape)
    first, b = inference_params.batch_size_offset, kv.shape[0]
    end = inference_params.seqlen_offset + kv.shape[1]
    cache: Tensor = caches[layer_idx][first : first + b]
    if cache.shape[0] != b or cache.shape[1] < end:
        raise ValueError(
            f"KV cache: {b} sequences from row {first} on, of {end} tokens, do not fit the cache "
            f"of layer {layer_idx}, which is {tuple(caches[layer_idx].shape)}"
        )
    return cache


def _update_kv_cache(
    kv: Tensor, inference_params: InferenceParams, layer_idx: int | None
) -> Tensor:
    """Write kv (b, s, 2, hk, d) at seqlen_offset; return all that is cached of these sequences.

    Returns a view of the cache, (b, seqlen_offset + s, 2, hk, d). Raises ValueError when it does
    not fit.
    """
    start = inference_params.seqlen_offset
    end = start + kv.shape[1]
    cache = layer_cache(kv, inference_params, layer_idx)
    cache[:, start:end] = kv
    return cache[:, :end]
