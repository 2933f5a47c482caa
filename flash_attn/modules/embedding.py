"""Embeddings of words, positions and segments; spread over ranks too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_attn.utils.distributed import all_reduce, reduce_scatter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _positions(input_ids: Tensor, position_ids: Optional[Tensor]) -> Tensor:
    """The positions of (b, s) tokens: counted from the first, unless they are given."""
    if position_ids is not None:
        return position_ids
    return torch.arange(input_ids.shape[1], dtype=torch.long, device=input_ids.device)


class GPT2Embeddings(nn.Module):
    """Words plus positions.

    Args:
        max_position_embeddings: 0 for none.
        word_embed_proj_dim: width of the words' own embeddings, which `project_in` brings to
            embed_dim; None is embed_dim, without a projection.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: Optional[int] = None,
        word_embed_proj_dim: Optional[int] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        width = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=padding_idx, **where)
        self.project_in = (
            None
            if word_embed_proj_dim is None
            else nn.Linear(word_embed_proj_dim, embed_dim, bias=False, **where)
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **where)

    def forward(self, input_ids: Tensor, position_ids: Optional[Tensor] = None) -> Tensor:
        """(b, s, embed_dim). input_ids: (b, s). position_ids: (b, s) or (s,)."""
        embeddings = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            positions = _positions(input_ids, position_ids)
            embeddings = embeddings + self.position_embeddings(positions)
        return embeddings  # type: ignore[no-any-return]


class BertEmbeddings(nn.Module):
    """Words plus positions plus segments. max_position_embeddings, type_vocab_size: 0 for none."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: Optional[int] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, **where)
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **where)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, **where)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        token_type_ids: Optional[Tensor] = None,
    ) -> Tensor:
        """(b, s, embed_dim). input_ids: (b, s). token_type_ids: (b, s), None is all 0."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            positions = _positions(input_ids, position_ids)
            embeddings = embeddings + self.position_embeddings(positions)
        if self.type_vocab_size > 0:
            kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            embeddings = embeddings + self.token_type_embeddings(kinds)
        return embeddings  # type: ignore[no-any-return]


def _part(function: str, count: int, process_group: Optional[ProcessGroup], what: str) -> int:
    """What of `count` each rank has."""
    ranks = 1 if process_group is None else dist.get_world_size(process_group)
    if count % ranks != 0:
        raise ValueError(f"{function}: {what} is {count}; the {ranks} ranks must divide it")
    return count // ranks


class VocabParallelEmbedding(nn.Embedding):
    """Each rank has some of the words; the sum over all ranks is the embedding."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        process_group: Optional[ProcessGroup] = None,
        padding_idx: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        own = _part("VocabParallelEmbedding", num_embeddings, process_group, "num_embeddings")
        if padding_idx is not None and own < num_embeddings:
            raise RuntimeError(
                "VocabParallelEmbedding: padding_idx is not supported with several ranks; got "
                f"padding_idx {padding_idx}"
            )
        super().__init__(own, embedding_dim, padding_idx=padding_idx, **kwargs)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if self.process_group is None:
            return super().forward(input)
        first = dist.get_rank(self.process_group) * self.num_embeddings
        is_elsewhere = (input < first) | (input >= first + self.num_embeddings)
        own = (input - first).masked_fill(is_elsewhere, 0)
        return super().forward(own).masked_fill(is_elsewhere.unsqueeze(-1), 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """Each rank has some of the columns."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        process_group: Optional[ProcessGroup] = None,
        **kwargs: Any,
    ) -> None:
        own = _part("ColumnParallelEmbedding", embedding_dim, process_group, "embedding_dim")
        super().__init__(num_embeddings, own, **kwargs)


class ParallelGPT2Embeddings(nn.Module):
    """`GPT2Embeddings`, its words and the columns of its positions spread over ranks.

    With `sequence_parallel` each rank gets its part of the first dimension of the result, else all.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group: Optional[ProcessGroup],
        padding_idx: Optional[int] = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype, "process_group": process_group}
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size, embed_dim, padding_idx=padding_idx, **where
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(
                max_position_embeddings, embed_dim, **where
            )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        combine_batch_seqlen_dim: bool = False,
    ) -> Tensor:
        """input_ids: (b, s). combine_batch_seqlen_dim: rows of the result are (b s)."""
        group = self.process_group
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            own = self.position_embeddings(_positions(input_ids, position_ids))
            rank = 0 if group is None else dist.get_rank(group)
            before = rank * own.shape[-1]
            behind = embeddings.shape[-1] - before - own.shape[-1]
            embeddings = embeddings + nn.functional.pad(own, (before, behind))
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if group is None:
            return embeddings  # type: ignore[no-any-return]
        return (reduce_scatter if self.sequence_parallel else all_reduce)(embeddings, group)
