"""Under PyTorch's own attention, where a program asks for it.

    import flash_attn
    torch.nn.attention.activate_flash_attention_impl("flash_attn")

From then on, for CUDA tensors, the flash backend of `scaled_dot_product_attention` is this
package's operators, forward and backward, and torch prefers it to its other backends; so is what
`torch.nn.attention.varlen` and nested tensors call. `restore_flash_attention_impl()` takes it back.

Each function below is the `aten` operator of its name, whose schema torch has. Operators that torch
calls with arguments that this package has no use for take them as `unused`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Optional

import torch
from torch import Tensor
from torch.backends import cuda as settings
from torch.nn import attention

from flash_attn import _arguments, _ops
from flash_attn._problem import Mask, Sequences
from flash_attn.backends import cuda

NAME = "flash_attn"
_OPS = torch.ops.flash_attn


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Optional[Tensor],
    cum_seq_k: Optional[Tensor],
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: Optional[float] = None,
    window_size_left: Optional[int] = None,
    window_size_right: Optional[int] = None,
    seqused_k: Optional[Tensor] = None,
    alibi_slopes: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    out: Optional[Tensor] = None,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, logsumexp, the state of dropout, nothing, S_dmask; (b, s, h, d), or (total, h, d) with
    `cum_seq_q`.
    """
    q, k, v = _rows(query, key, value)
    softmax_scale = _arguments.scale(scale, q)
    window = _bound(window_size_left), _bound(window_size_right)
    wants_mask = return_debug_mask and dropout_p > 0
    if out is None and cum_seq_q is None and seqused_k is None and block_table is None:
        found = _OPS._flash_attn_forward.default(
            q, k, v, dropout_p, softmax_scale, is_causal, *window, 0.0, alibi_slopes, wants_mask
        )
    else:
        sequences = Sequences(
            cum_seq_q,
            cum_seq_k,
            seqused_k=seqused_k,
            block_table=block_table,
            max_seqlen_q=None if cum_seq_q is None else max_q,
            max_seqlen_k=None if cum_seq_k is None else max_k,
        )
        mask = Mask.of(is_causal, *window)
        rules = softmax_scale, 0.0, alibi_slopes, dropout_p, wants_mask
        found = _ops.run_forward(NAME, q, k, v, sequences, mask, *rules, out)
    result, softmax_lse, s_dmask, rng_state = found
    offset = torch.empty((), dtype=torch.uint64, device=q.device)
    return result, softmax_lse, rng_state.view(torch.uint64), offset, s_dmask


def _flash_attention_forward_no_dropout_inplace(out: Tensor, *args: Any, **options: Any) -> Tensor:
    return _flash_attention_forward(*args, **options, out=out)[1]


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Optional[Tensor],
    cum_seq_k: Optional[Tensor],
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: Optional[float] = None,
    window_size_left: Optional[int] = None,
    window_size_right: Optional[int] = None,
) -> tuple[Tensor, ...]:
    tensors = (*_rows(grad_out, query, key, value, out), logsumexp)
    softmax_scale = _arguments.scale(scale, query)
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    rules = (
        is_causal,
        _bound(window_size_left),
        _bound(window_size_right),
        0.0,
        None,
        torch.are_deterministic_algorithms_enabled(),
        rng_state.view(torch.int64),
    )
    if cum_seq_q is None:
        _OPS._flash_attn_backward.default(*tensors, *grads, dropout_p, softmax_scale, *rules)
    else:
        sequences = cum_seq_q, cum_seq_k, max_q, max_k
        _OPS._flash_attn_varlen_backward.default(
            *tensors, *grads, *sequences, dropout_p, softmax_scale, *rules
        )
    return grads


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: Optional[float] = None,
) -> tuple[Any, ...]:
    """The same of (b, h, s, d). The result's strides are in the order of the query's.

    The compiled shim has it once more (`csrc/torch/ops_sdpa.cpp`), for the CPU time of a call.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    sizes = query.shape[2], key.shape[2]
    out, softmax_lse, *rest = _flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        *sizes,
        dropout_p,
        is_causal,
        return_debug_mask,
        scale=scale,
        out=torch.empty_like(query).transpose(1, 2),
    )
    return out.transpose(1, 2), softmax_lse, None, None, *sizes, *rest


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *args: Any,
    scale: Optional[float] = None,
) -> tuple[Tensor, ...]:
    dout, q, k, v, rows = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = _flash_attention_backward(dout, q, k, v, rows, *args, scale=scale)
    return tuple(x.transpose(1, 2) for x in grads)


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What the operators want: elements of a row stand together."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _bound(window: Optional[int]) -> int:
    return -1 if window is None else window


_OPERATORS: tuple[Callable[..., Any], ...] = (
    _flash_attention_forward,
    _flash_attention_forward_no_dropout_inplace,
    _flash_attention_backward,
    _scaled_dot_product_flash_attention,
    _scaled_dot_product_flash_attention_backward,
)


def _preferred() -> list[attention.SDPBackend]:
    """SDPA's backends that are switched on, flash in front. On Hopper torch prefers cuDNN."""
    backends = attention.SDPBackend
    rows = (
        (backends.FLASH_ATTENTION, settings.flash_sdp_enabled),
        (backends.CUDNN_ATTENTION, settings.cudnn_sdp_enabled),
        (backends.EFFICIENT_ATTENTION, settings.mem_efficient_sdp_enabled),
        (backends.MATH, settings.math_sdp_enabled),
    )
    return [backend for backend, is_enabled in rows if is_enabled()]


# Of the dense forward operator, which the shim serves: it takes arguments by their places.
_DENSE_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, "
    "bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, "
    "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor rng_state, "
    "Tensor unused, Tensor debug_attn_mask)"
)


def _has_dense_schema() -> bool:
    """Whether this torch's dense forward operator is the one that the shim knows."""
    found = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    return str(found).endswith(f"::_scaled_dot_product_flash_attention{_DENSE_SCHEMA}")


class Activated:
    """The operators in torch's places, until they are removed."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            # torch finds out what it prefers in its first call: it would forget what is set before.
            x = torch.zeros(1, 1, 8, 8, dtype=torch.float16, device="cuda")
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
            cuda.gives_way(x.device)  # where no compiled kernel is for it, others serve it
        library = torch.library.Library("aten", "IMPL", "CUDA")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that torch's own are replaced
            for operator in _OPERATORS:
                if hasattr(torch.ops.aten, operator.__name__):
                    library.impl(operator.__name__, operator)
        self._library: Optional[torch.library.Library] = library
        if _has_dense_schema():
            cuda.serve_sdpa(True)
        self._settings = ExitStack()
        self._settings.enter_context(attention.sdpa_kernel(_preferred(), set_priority=True))

    def remove(self) -> None:
        cuda.serve_sdpa(False)
        self._library = None
        self._settings.close()


def make_known() -> None:
    """Tells torch of the name, where it has a place for it (2.11 and later)."""
    if hasattr(attention, "register_flash_attention_impl"):
        attention.register_flash_attention_impl(NAME, register_fn=Activated)
