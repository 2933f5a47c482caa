"""What a model needs to generate text token by token: the state of its KV caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class InferenceParams:
    """The state of generation that every layer sees in one forward call.

    max_seqlen, max_batch_size: the size of the caches. seqlen_offset: tokens already in them.
    batch_size_offset: the first cache row of this call's batch. key_value_memory_dict: layer index
    to that layer's cache (max_batch_size, max_seqlen, 2, hk, d), made by the layer when missing.
    lengths_per_sample: int32 (max_batch_size,), tokens already in each row of the caches where rows
    differ; overrides seqlen_offset.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew, in the same caches: nothing is in them, and lengths become zero."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
