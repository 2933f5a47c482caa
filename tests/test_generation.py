"""The state of generation that layers share."""

from __future__ import annotations

import torch

from flash_attn.utils.generation import InferenceParams


def test_defaults_are_the_published_ones() -> None:
    params = InferenceParams(16, 2)
    assert (params.max_seqlen, params.max_batch_size) == (16, 2)
    assert (params.seqlen_offset, params.batch_size_offset) == (0, 0)
    assert params.key_value_memory_dict == {}
    assert params.lengths_per_sample is None


def test_states_do_not_share_their_caches() -> None:
    InferenceParams(16, 2).key_value_memory_dict[0] = "cache"
    assert InferenceParams(16, 2).key_value_memory_dict == {}


def test_reset_begins_anew_in_the_same_caches() -> None:
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    params = InferenceParams(16, 2, seqlen_offset=4, lengths_per_sample=lengths)
    params.key_value_memory_dict[0] = "cache"
    params.reset(8, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (8, 1, 0)
    assert params.key_value_memory_dict == {0: "cache"}
    # A captured CUDA graph reads this tensor, so it must stay the same one.
    assert params.lengths_per_sample is lengths
    assert lengths.tolist() == [0, 0]
    InferenceParams(16, 2).reset(8, 1)
