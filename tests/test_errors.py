"""Every rejected argument: its exception, its message, and that nothing was written before it.

Rows are in `bad_calls.py`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bad_calls import CALLS, EIGHTS, FORWARD, FP8, HQ, PAGED_CALL, PQ, ROWS, SQ, VARLEN, K, Q, V
from torch import Tensor

import flash_attn
import flash_attn_interface as fa3


def snapshot(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors that hold values, wide enough to be compared."""
    return {
        name: x.detach().to(torch.float64, copy=True)
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.device.type == "cpu" and not x.is_complex()
    }


@pytest.mark.parametrize(
    ("name", "what", "changes", "error", "message"), ROWS, ids=[f"{r[0]}-{r[1]}" for r in ROWS]
)
def test_argument_is_rejected_before_anything_is_written(
    name: str, what: str, changes: dict[str, Any], error: Any, message: str
) -> None:
    function, good = CALLS[name]
    arguments = {
        key: x.clone() if isinstance(x, Tensor) and x.is_contiguous() else x
        for key, x in {**good, **changes}.items()
    }
    before = snapshot(arguments)
    called = name.replace("FA3 ", "")
    with pytest.raises(error, match=rf"(?s)^{called}: {message}") as caught:
        function(**arguments)
    assert caught.type in (error if isinstance(error, tuple) else (error,))
    for key, x in snapshot(arguments).items():
        assert torch.equal(before[key], x), f"{key} was changed"


@pytest.mark.parametrize("name", CALLS)
def test_the_unchanged_call_is_accepted(name: str) -> None:
    function, good = CALLS[name]
    result = function(**{k: x.clone() if isinstance(x, Tensor) else x for k, x in good.items()})
    first = result if isinstance(result, Tensor) else result[0]
    assert not first.isnan().any()


# Torch itself refuses these, by the operator's schema: it names the argument and what it found.
BY_SCHEMA = [
    ("dropout_p", "0.1"),
    ("dropout_p", None),
    ("softmax_scale", 1j),
    ("softmax_scale", torch.tensor([0.5, 0.2])),
    ("causal", "x"),
    ("softcap", None),
    ("alibi_slopes", [0.1] * HQ),
    ("window_size_left", 1.5),
    ("window_size_left", None),
    ("window_size_right", 2**63),
]


@pytest.mark.parametrize(("argument", "value"), BY_SCHEMA, ids=lambda x: str(x)[:20])
def test_a_value_of_the_wrong_type_is_named(argument: str, value: Any) -> None:
    function, good = CALLS[FORWARD]
    with pytest.raises(RuntimeError, match=rf"_flash_attn_forward\(\) .*argument '{argument}'"):
        function(**{**good, argument: value})


# --- What cannot be a row -----------------------------------------------------------------------


def test_attention_over_pages_has_no_backward() -> None:
    function, good = CALLS[VARLEN]
    arguments = {**good, **PAGED_CALL, "q": PQ.clone().requires_grad_()}
    out = function(**arguments)
    message = "^flash_attn_varlen_func: attention over pages has no backward"
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()


@pytest.mark.parametrize("option", [{"attention_chunk": 3}, {"qv": Q}], ids=["chunk", "qv"])
def test_fa3_options_without_backward_say_so(option: dict[str, Any]) -> None:
    out = fa3.flash_attn_func(Q.clone().requires_grad_(), K, V, **option)
    with pytest.raises(RuntimeError, match=f"FA3 backward does not support {next(iter(option))}"):
        out.sum().backward()


def test_fp8_keys_have_no_backward() -> None:
    out = flash_attn.flash_attn_func(Q.clone().requires_grad_(), K.to(FP8), V.to(FP8))
    with pytest.raises(RuntimeError, match="query and key must have the same dtype"):
        out.sum().backward()


def test_fp8_has_no_backward() -> None:
    q = Q.to(FP8).requires_grad_()
    out = fa3.flash_attn_func(q, EIGHTS["k"], EIGHTS["v"])
    with pytest.raises(RuntimeError, match="FP8 inputs have no backward"):
        out.sum().backward()


def test_the_published_names_of_arguments_are_the_only_ones() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        flash_attn.flash_attn_func(Q, K, V, dropout=0.1)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (99, 99)}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_what_is_not_finite_shows_in_the_output(
    argument: str, value: float, options: dict[str, Any]
) -> None:
    # A NaN that attention turned into 0 would hide a broken model.
    tensors = {"q": Q.clone(), "k": K[:, :SQ].clone(), "v": V[:, :SQ].clone()}
    tensors[argument][0, 0] = value
    out = flash_attn.flash_attn_func(**tensors, **options)
    assert not out[0, 0].isfinite().any()
    assert out[1].isfinite().all()
