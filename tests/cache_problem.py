"""What a decoding row of `problems.py` is: one step over a KV cache, and its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch
from problem_types import (
    BF16,
    DTYPE_NAMES,
    FP8,
    FP32,
    Lengths,
    cumulative,
    descales,
    int32,
    nan_filled,
    normal,
    place,
    seeded,
    slopes,
)
from torch import Tensor


@dataclass(frozen=True)
class CacheProblem:
    """One decoding step. `page` > 0 makes the cache paged; `lens_q`/`lens_new` make q/k ragged.

    A cache has the dtype of the queries unless `cache_dtype` says another.
    """

    b: int = 2
    sq: int = 1
    capacity: int = 128
    s_new: int = 0
    hq: int = 4
    hk: int = 2
    d: int = 64
    dv: Optional[int] = None
    dtype: torch.dtype = FP32
    cache_dtype: Optional[torch.dtype] = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""
    softmax_scale: Optional[float] = None
    attention_chunk: int = 0
    qv: bool = False
    seqlens: Optional[Lengths] = (40, 97)
    scalar_seqlen: bool = False
    leftpad: Optional[Lengths] = None
    batch_idx: Optional[Lengths] = None
    page: int = 0
    rotary_dim: int = 0
    interleaved: bool = True
    rotary_seqlens: Optional[Lengths] = None
    lens_q: Optional[Lengths] = None
    lens_new: Optional[Lengths] = None
    descale: bool = False
    num_splits: int = 0
    layout: str = "plain"

    @property
    def value_dim(self) -> int:
        return self.d if self.dv is None else self.dv

    @property
    def low_dtype(self) -> torch.dtype:
        """The precision of the yardstick run and of the result."""
        return BF16 if self.dtype == FP8 else self.dtype

    def __str__(self) -> str:
        def lengths(name: str, values: Optional[Lengths]) -> str:
            return "" if values is None else f"{name}{'.'.join(map(str, values))}"

        parts = [
            f"b{self.b}",
            lengths("q", self.lens_q) or f"sq{self.sq}",
            f"cap{self.capacity}",
            lengths("scalarlen" if self.scalar_seqlen else "len", self.seqlens) or "full",
            lengths("new", self.lens_new) or (f"new{self.s_new}" if self.s_new else ""),
            f"h{self.hq}k{self.hk}",
            f"d{self.d}" + (f"v{self.dv}" if self.dv is not None else ""),
            DTYPE_NAMES[self.dtype],
            f"cache_{DTYPE_NAMES[self.cache_dtype]}" if self.cache_dtype is not None else "",
            f"page{self.page}" if self.page else "",
            lengths("left", self.leftpad),
            lengths("idx", self.batch_idx),
            f"rotary{self.rotary_dim}{'i' if self.interleaved else 'h'}" if self.rotary_dim else "",
            lengths("rotaryat", self.rotary_seqlens),
            "causal" if self.causal else "",
            "window{}.{}".format(*self.window) if self.window != (-1, -1) else "",
            f"softcap{self.softcap:g}" if self.softcap else "",
            f"alibi_{self.alibi}" if self.alibi else "",
            f"scale{self.softmax_scale:g}" if self.softmax_scale is not None else "",
            f"chunk{self.attention_chunk}" if self.attention_chunk else "",
            "qv" if self.qv else "",
            "descale" if self.descale else "",
            f"splits{self.num_splits}" if self.num_splits else "",
            self.layout if self.layout != "plain" else "",
        ]
        return "-".join(part for part in parts if part)

    @property
    def new_lengths(self) -> Lengths:
        return self.lens_new if self.lens_new is not None else (self.s_new,) * self.b

    def _poison_unused(self, caches: tuple[Tensor, Tensor]) -> None:
        """NaN at every position of dense (b_cache, capacity, h, d) caches that is no valid key."""
        if self.seqlens is None:
            return
        rows = self.batch_idx if self.batch_idx is not None else tuple(range(self.b))
        for cache in caches:
            valid = torch.zeros(cache.shape[:2], dtype=torch.bool)
            for i, row in enumerate(rows):
                left = self.leftpad[i] if self.leftpad is not None else 0
                valid[row, left : self.seqlens[i]] = True
            cache[~valid] = math.nan

    def _paged(
        self, caches: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Dense caches cut into pages in random order, with a spare page of NaN at the end."""
        pages_per_row = -(-self.capacity // self.page)
        b_cache = caches[0].shape[0]
        order = torch.randperm(b_cache * pages_per_row, generator=generator)
        paged = {}
        for name, cache in zip(("k_cache", "v_cache"), caches):
            padding = pages_per_row * self.page - self.capacity
            filler = nan_filled(cache, b_cache, padding, *cache.shape[2:])
            pages = torch.cat((cache, filler), dim=1).reshape(-1, self.page, *cache.shape[2:])
            spare = nan_filled(cache, 1, self.page, *cache.shape[2:])
            paged[name] = torch.cat((pages[order.argsort()], spare))
        table = order.view(b_cache, pages_per_row).to(torch.int32)
        rows = self.batch_idx if self.batch_idx is not None else tuple(range(self.b))
        if self.seqlens is not None:
            for i, row in enumerate(rows):
                table[row, -(-(self.seqlens[i] + self.new_lengths[i]) // self.page) :] = len(order)
        paged["block_table"] = table
        return paged

    def _rotary(self, generator: torch.Generator) -> dict[str, Tensor]:
        if not self.rotary_dim:
            return {}
        positions = self.capacity + self.page + max(self.rotary_seqlens or (0,))
        angle = torch.rand(positions, self.rotary_dim // 2, generator=generator) * 2 * math.pi
        return {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The row's tensors by the names of the published arguments (`block_table` for pages)."""
        generator = seeded(str(self))
        b_cache = self.b if self.batch_idx is None else max(self.batch_idx) + 2
        lead_q = (self.b, self.sq) if self.lens_q is None else (sum(self.lens_q),)
        lead_new = (self.b, self.s_new) if self.lens_new is None else (sum(self.lens_new),)
        q = normal((*lead_q, self.hq, self.d), generator) * max(1.0, self.softcap / 2)
        k_cache = normal((b_cache, self.capacity, self.hk, self.d), generator)
        v_cache = normal((b_cache, self.capacity, self.hk, self.value_dim), generator)
        values: dict[str, Tensor] = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
        if self.qv:
            values["qv"] = normal((*lead_q, self.hq, self.value_dim), generator)
        if any(self.new_lengths):
            values["k"] = normal((*lead_new, self.hk, self.d), generator)
            values["v"] = normal((*lead_new, self.hk, self.value_dim), generator)
        values.update(self._rotary(generator))
        self._poison_unused((k_cache, v_cache))
        if self.page:
            values.update(self._paged((k_cache, v_cache), generator))
        of_cache = ("k_cache", "v_cache", "k", "v")
        for name, x in values.items():
            dtype = self.cache_dtype if name in of_cache and self.cache_dtype else self.dtype
            values[name] = x.to(device) if name == "block_table" else x.to(device, dtype)
        for name in {"q", "qv", "k_cache", "v_cache"} & values.keys():
            values[name] = place(values[name], self.layout)
        optional = {
            "cache_seqlens": int32(self.seqlens, device),
            "cache_leftpad": int32(self.leftpad, device),
            "cache_batch_idx": int32(self.batch_idx, device),
            "rotary_seqlens": int32(self.rotary_seqlens, device),
            "alibi_slopes": slopes(self.alibi, self.b, self.hq, generator, device),
        }
        values.update({name: x for name, x in optional.items() if x is not None})
        if self.descale:
            values.update(descales(self.b, self.hk, generator, device))
            if self.dtype != FP8:
                del values["q_descale"]
        if self.lens_q is not None:
            values["cu_seqlens_q"] = cumulative(self.lens_q, device)
        if self.lens_new is not None:
            values["cu_seqlens_k_new"] = cumulative(self.lens_new, device)
        return values
