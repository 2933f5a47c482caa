"""Transformer blocks: a mixer and an MLP between residuals, norms and dropouts.

`Block` has one behind the other, `ParallelBlock` both on the same input (as GPT-J and PaLM do).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import Mlp
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn

Make = Callable[..., nn.Module]


class StochasticDepth(nn.Module):
    """While training drops an input with probability p, each of a batch by itself, or with mode
    "batch" all of them at once; what remains is scaled up (arXiv:1603.09382).
    """

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0 or mode not in ("row", "batch"):
            raise ValueError(
                "StochasticDepth: p must lie in [0, 1] and mode be row or batch; "
                f"got p {p}, mode {mode!r}"
            )
        self.p = p
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        count = x.shape[0] if self.mode == "row" else 1
        kept = x.new_empty(count, *[1] * (x.dim() - 1)).bernoulli_(1.0 - self.p)
        return x * (kept if self.p == 1.0 else kept / (1.0 - self.p))


class _Stage(NamedTuple):
    """What stands between two parts of a block."""

    dropout: nn.Module
    drop_path: nn.Module
    norm: nn.Module


def _mark(norm: nn.Module, sequence_parallel: bool, is_shared: bool) -> None:
    """Tells `utils.distributed` about a norm's parameters."""
    for parameter in norm.parameters():
        if sequence_parallel:
            parameter._sequence_parallel = True  # type: ignore[attr-defined]
        if is_shared:
            parameter._shared_params = True  # type: ignore[attr-defined]


def _check_fused(function: str, *norms: nn.Module) -> None:
    for norm in norms:
        if not isinstance(norm, (nn.LayerNorm, RMSNorm)):
            raise ValueError(
                f"{function}: fused_dropout_add_ln goes with LayerNorm and RMSNorm; "
                f"got {type(norm).__name__}"
            )


def _fused_options(norm: Any, dropout: Any) -> dict[str, Any]:
    """What `layer_norm_fn` must know of a norm and the dropout in front of it."""
    return {
        "eps": norm.eps,
        "dropout_p": dropout.p if dropout.training else 0.0,
        "zero_centered_weight": getattr(norm, "zero_centered_weight", False),
        "is_rms_norm": isinstance(norm, RMSNorm),
    }


class Block(nn.Module):
    """A mixer, then an MLP.

    With `prenorm` a block begins with what the one before left to do: dropout, the residual, a
    norm. So it takes and returns a pair, the last part's result and the residual. Without, a norm
    stands behind each part, as in the first transformers.

    Args:
        dim: features of a token.
        mixer_cls: makes the mixer of dim; None is `MHA` with heads of 64.
        mlp_cls: makes the MLP of dim, `nn.Identity` for none; None is `Mlp` of 4 dim.
        norm_cls, dropout_cls: make a norm of dim, and a dropout of its probability.
        resid_dropout1, resid_dropout2: dropout of what comes into the first norm, and the second.
        drop_path1, drop_path2: stochastic depth there.
        fused_dropout_add_ln: dropout, residual and norm as one kernel (`layer_norm_fn`).
        return_residual: without `prenorm`: the parts return their input as well.
        residual_in_fp32: keep the residual in float32.
        sequence_parallel, mark_shared_params: mark the norms' parameters for `utils.distributed`.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Optional[Make] = None,
        mlp_cls: Optional[Make] = None,
        norm_cls: Make = nn.LayerNorm,
        dropout_cls: Make = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise ValueError("Block: residual_in_fp32 goes with prenorm; got prenorm False")
        self.prenorm = prenorm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.return_residual = return_residual
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.drop_path1 = StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        self.has_mlp = not isinstance(self.mlp, nn.Identity)
        norms = [self.norm1]
        if self.has_mlp:
            self.dropout2 = dropout_cls(resid_dropout2)
            self.drop_path2 = StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
            norms.append(self.norm2)
        if fused_dropout_add_ln:
            _check_fused("Block", *norms)
        for norm in norms:
            _mark(norm, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Optional[torch.dtype] = None, **kwargs: Any
    ) -> Any:
        """The mixer's cache."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Optional[Tensor] = None,
        mixer_subset: Any = None,
        mixer_kwargs: Optional[dict[str, Any]] = None,
    ) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """hidden_states, residual: (b, s, dim).

        mixer_subset: rows that go on behind the mixer, as `MHA` takes it; with `prenorm`.
        mixer_kwargs: further arguments of the mixer.
        """
        options = dict(mixer_kwargs or {})
        if self.prenorm:
            return self._prenorm(hidden_states, residual, mixer_subset, options)
        if residual is not None or mixer_subset is not None:
            argument = "residual" if residual is not None else "mixer_subset"
            raise ValueError(f"Block: {argument} goes with prenorm; got prenorm False")
        return self._postnorm(hidden_states, options)

    def _stages(self) -> tuple[_Stage, ...]:
        first = _Stage(self.dropout1, self.drop_path1, self.norm1)
        if not self.has_mlp:
            return (first,)
        return first, _Stage(self.dropout2, self.drop_path2, self.norm2)

    def _prenorm(
        self, x: Tensor, residual: Optional[Tensor], subset: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        first, *second = self._stages()
        x, kept = self._normed(first, x, residual)
        if subset is not None:
            options["mixer_subset"] = subset
        x = self.mixer(x, **options)
        if subset is not None:
            kept = kept[:, subset]
        for stage in second:
            x, kept = self._normed(stage, x, kept)
            x = self.mlp(x)
        return x, kept

    def _postnorm(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        parts: tuple[Callable[..., Any], ...] = partial(self.mixer, **options), self.mlp
        for stage, part in zip(self._stages(), parts):
            result, x = part(x) if self.return_residual else (part(x), x)
            x, _ = self._normed(stage, result, x)
        return x

    def _normed(
        self, stage: _Stage, x: Tensor, residual: Optional[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The norm of x, behind its dropouts, plus the residual; and that sum."""
        norm: Any = stage.norm
        if self.fused_dropout_add_ln:
            rowscale = None
            if self.training and stage.drop_path.p:
                rowscale = stage.drop_path(x.new_ones(x.shape[:-1]))
            y, total = layer_norm_fn(  # type: ignore[misc]
                x,
                norm.weight,
                norm.bias,
                residual,
                rowscale=rowscale,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                **_fused_options(norm, stage.dropout),
            )
            return y, total  # type: ignore[return-value]
        total = stage.drop_path(stage.dropout(x))
        if residual is not None:
            total = total + residual
        y = norm(total.to(norm.weight.dtype))
        return y, total.float() if self.residual_in_fp32 else total


class ParallelBlock(nn.Module):
    """A mixer and an MLP beside one another, behind the norms of the same residual.

    It begins with what the block before left to do: dropouts of its two results, the residual,
    norms. `tied_norm`: one norm for both. The other arguments are those of `Block`.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Optional[Make] = None,
        mlp_cls: Optional[Make] = None,
        norm_cls: Make = nn.LayerNorm,
        dropout_cls: Make = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.tied_norm = tied_norm
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.residual_in_fp32 = residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1 = dropout_cls(resid_dropout1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        norms = [self.norm1]
        if not tied_norm:
            self.norm2 = norm_cls(dim)
            norms.append(self.norm2)
        if fused_dropout_add_ln:
            _check_fused("ParallelBlock", *norms)
            if resid_dropout1 != resid_dropout2:
                raise ValueError(
                    "ParallelBlock: fused_dropout_add_ln has one dropout probability; "
                    f"got {resid_dropout1} and {resid_dropout2}"
                )
        for norm in norms:
            _mark(norm, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Optional[torch.dtype] = None, **kwargs: Any
    ) -> Any:
        """The mixer's cache."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Optional[Tensor] = None,
        residual: Optional[Tensor] = None,
        mixer_kwargs: Optional[dict[str, Any]] = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(result of the mixer, result of the MLP, residual), each (b, s, dim).

        hidden_states1, hidden_states2: the two results of the block before; the second is None in
        the first block.
        """
        normed = self._fused if self.fused_dropout_add_ln else self._apart
        x, y, total = normed(hidden_states1, hidden_states2, residual)
        return self.mixer(x, **(mixer_kwargs or {})), self.mlp(y), total

    def _apart(
        self, x: Tensor, y: Optional[Tensor], residual: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = self.dropout1(x)
        if y is not None:
            total = total + self.dropout2(y)
        if residual is not None:
            total = total + residual
        dtype: Any = self.norm1.weight.dtype
        first = self.norm1(total.to(dtype))
        second = first if self.tied_norm else self.norm2(total.to(dtype))
        return first, second, total.float() if self.residual_in_fp32 else total

    def _fused(
        self, x: Tensor, y: Optional[Tensor], residual: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm: Any = self.norm1
        other: Any = None if self.tied_norm else self.norm2
        first, *second, total = layer_norm_fn(  # type: ignore[misc]
            x,
            norm.weight,
            norm.bias,
            residual,
            x1=y,
            weight1=None if other is None else other.weight,
            bias1=None if other is None else other.bias,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            **_fused_options(norm, self.dropout1),
        )
        return first, second[0] if second else first, total  # type: ignore[return-value]
