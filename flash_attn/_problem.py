"""The vocabulary between the public functions and the backends: one call as plain data.

b batch, sq / sk query and key length, hq / hk query and key-value heads, d / dv head dims.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from flash_attn import _support


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """out is bfloat16 for queries of FP8, else of their dtype."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """softmax_lse, softmax_d and sums on the CPU are float32, and float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_up(n: int) -> int:
    """n rounded up as in the shapes of S_dmask and softmax_d."""
    step = _support.ROUND_TO
    return (n + step - 1) // step * step


def softmax_d_shape(q: Tensor, b: int) -> tuple[int, ...]:
    """(b, hq, round128(sq)), or (hq, total_q + 128 b) of b packed sequences."""
    if q.dim() == 3:
        return q.shape[1], q.shape[0] + _support.ROUND_TO * b
    return b, q.shape[2], round_up(q.shape[1])


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, aligned to the bottom right corner.

    With ``diagonal = i + sk - sq``, key ``j`` is visible to query ``i`` iff
    ``diagonal - left <= j <= diagonal + right`` (a negative bound is no bound) and, with a
    positive ``chunk``, ``j // chunk == diagonal // chunk``.
    """

    left: int = -1
    right: int = -1
    chunk: int = 0

    @classmethod
    def of(cls, causal: bool, left: int, right: int, chunk: int = 0) -> Mask:
        """The mask of the published arguments: `causal` bounds the right side at the diagonal."""
        return cls(max(left, -1), 0 if causal else max(right, -1), chunk)

    @property
    def is_full(self) -> bool:
        return self.left < 0 and self.right < 0 and not self.chunk

    @property
    def is_causal(self) -> bool:
        return self.left < 0 and self.right == 0 and not self.chunk


@dataclass(frozen=True, eq=False)
class Scores:
    """How a score becomes a probability.

    Args:
        softmax_scale: factor on q k^T.
        mask: visible keys.
        softcap: c > 0 replaces a scaled score s by c * tanh(s / c).
        alibi_slopes: (hq,) or (b, hq), float32; adds -slope * |i + sk - sq - j|.
        dropout_p: probability of dropping an entry of softmax.
        rng_state: (2,) int64 seed and offset of the dropout stream; given iff dropout_p > 0.
    """

    softmax_scale: float
    mask: Mask = field(default_factory=Mask)
    softcap: float = 0.0
    alibi_slopes: Optional[Tensor] = None
    dropout_p: float = 0.0
    rng_state: Optional[Tensor] = None


@dataclass(frozen=True, eq=False)
class Sequences:
    """Which rows belong to which sequence; all None means a dense batch (b, s, h, d).

    Args:
        cu_seqlens_q, cu_seqlens_k: (b + 1,) int32 row offsets into packed (total, h, d) tensors.
        seqused_q, seqused_k: (b,) int32 rows in use, counted from the sequence's first row.
        leftpad_k: (b,) int32 keys to skip at the start.
        block_table: (b, max_pages) int32; k and v are then (num_pages, page_size, hk, d).
        kv_batch_idx: (b,) int32 row of the cache (or of `block_table`) that a sequence reads.
        max_seqlen_q, max_seqlen_k: upper bounds that size the work of packed sequences.
    """

    cu_seqlens_q: Optional[Tensor] = None
    cu_seqlens_k: Optional[Tensor] = None
    seqused_q: Optional[Tensor] = None
    seqused_k: Optional[Tensor] = None
    leftpad_k: Optional[Tensor] = None
    block_table: Optional[Tensor] = None
    kv_batch_idx: Optional[Tensor] = None
    max_seqlen_q: Optional[int] = None
    max_seqlen_k: Optional[int] = None

    @property
    def is_dense(self) -> bool:
        """Whether every sequence has all rows of a plain (b, s, h, d) batch."""
        return all(
            x is None
            for x in (
                self.cu_seqlens_q,
                self.cu_seqlens_k,
                self.seqused_q,
                self.seqused_k,
                self.leftpad_k,
                self.block_table,
                self.kv_batch_idx,
            )
        )


@dataclass(frozen=True, eq=False)
class Append:
    """New keys and values, written into the cache before attention.

    Args:
        k, v: (b, s_new, hk, d), or (total_new, hk, d) with `cu_seqlens`.
        cu_seqlens: (b + 1,) int32.
        rotary_cos, rotary_sin: (seqlen_ro, rotary_dim / 2); rotate the new keys and the queries.
        rotary_interleaved: pairs (2i, 2i + 1) if true, else (i, i + rotary_dim / 2).
        rotary_seqlens: (b,) int32 position of the first new key, in place of the cache length.
    """

    k: Tensor
    v: Tensor
    cu_seqlens: Optional[Tensor] = None
    rotary_cos: Optional[Tensor] = None
    rotary_sin: Optional[Tensor] = None
    rotary_interleaved: bool = True
    rotary_seqlens: Optional[Tensor] = None


@dataclass(frozen=True, eq=False)
class Descale:
    """Factors (b, hk), float32, that undo the scaling of FP8 inputs; None is 1."""

    q: Optional[Tensor] = None
    k: Optional[Tensor] = None
    v: Optional[Tensor] = None


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward call. `out`, if given, is written in place; `sm_margin` multiprocessors are left
    to other kernels where CTAs share the work.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Scores
    sequences: Sequences = field(default_factory=Sequences)
    append: Optional[Append] = None
    qv: Optional[Tensor] = None
    descale: Descale = field(default_factory=Descale)
    return_softmax: bool = False
    num_splits: int = 0
    sm_margin: int = 0
    out: Optional[Tensor] = None

    def problem(self) -> Problem:
        """What this call needs from a backend."""
        extras = {
            "kv_append": self.append is not None,
            "rotary": self.append is not None and self.append.rotary_cos is not None,
            "qv": self.qv is not None,
        }
        return _problem_of(self, extras)


@dataclass(frozen=True, eq=False)
class Backward:
    """One backward call. `dq`, `dk`, `dv` are written in place; `sm_margin` as in `Forward`."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    scores: Scores
    sequences: Sequences = field(default_factory=Sequences)
    deterministic: bool = False
    sm_margin: int = 0

    def problem(self) -> Problem:
        """What this call needs from a backend."""
        return _problem_of(self, {"backward": True, "deterministic": self.deterministic})


@dataclass(frozen=True)
class Problem:
    """What a backend is asked for: the key of dispatch, free of tensors."""

    device_type: str
    dtype: str
    head_dim: int
    head_dim_v: int
    features: frozenset[str] = frozenset()
    capability: Optional[tuple[int, int]] = None

    @property
    def is_latent(self) -> bool:
        """Whether it is the absorbed form of latent attention: a second query, or a wide V."""
        return "qv" in self.features or self.head_dim_v > _support.MAX_HEAD_DIM

    def __str__(self) -> str:
        arch = f" (cc {self.capability[0]}.{self.capability[1]})" if self.capability else ""
        dims = f"{self.head_dim}" + (
            f"/{self.head_dim_v}" if self.head_dim != self.head_dim_v else ""
        )
        words = " ".join(sorted(self.features)) or "plain forward"
        return f"{self.device_type}{arch} {self.dtype} head_dim {dims}: {words}"


def _problem_of(call: Forward | Backward, extras: dict[str, bool]) -> Problem:
    """The problem of a call: `extras` holds what only one direction knows."""
    q, k, v = call.q, call.k, call.v
    scores, sequences = call.scores, call.sequences
    mask = scores.mask
    dtype, dtype_k = (str(x.dtype).replace("torch.", "") for x in (q, k))
    wanted = {
        **extras,
        "gqa": q.shape[-2] != k.shape[-2],
        "head_dim_v": q.shape[-1] != v.shape[-1],
        "fp8": _support.FP8_DTYPE in (dtype, dtype_k),
        "causal": mask.right == 0,
        "window": mask.left >= 0 or mask.right > 0,
        "attention_chunk": mask.chunk > 0,
        "alibi": scores.alibi_slopes is not None,
        "softcap": scores.softcap > 0,
        "dropout": scores.dropout_p > 0,
        "varlen": sequences.cu_seqlens_q is not None or sequences.cu_seqlens_k is not None,
        "seqused": sequences.seqused_q is not None or sequences.seqused_k is not None,
        "leftpad": sequences.leftpad_k is not None,
        "paged_kv": sequences.block_table is not None,
        "cache_batch_idx": sequences.kv_batch_idx is not None,
    }
    return Problem(
        device_type=q.device.type,
        dtype=dtype,
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        features=frozenset(name for name, is_wanted in wanted.items() if is_wanted),
        capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
    )
