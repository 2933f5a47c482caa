"""Whether Triton kernels run here: compiled where torch sees a GPU, else by the interpreter."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch

from flash_attn._problem import Forward, Mask, Scores
from flash_attn.backends import cuda, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Interpreters before this one lack constants that kernels compute (3.0), or make numbers of arrays
# of one element, which numpy 2.4 refuses (3.6).
_COMPLETE = (3, 9)


@cache
def why_not() -> str:
    """Why no Triton kernel runs here; empty if they do."""
    if not triton.is_installed():
        return triton.NOT_INSTALLED
    from flash_attn._triton.attention import forward
    from flash_attn._triton.numbers import VERSION

    x = torch.zeros(1, 40, 1, 16, dtype=torch.float16, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            forward(Forward(x, x, x, Scores(1.0, Mask())))
        except Exception as error:
            if VERSION >= _COMPLETE:
                raise
            version = ".".join(map(str, VERSION))
            return f"the interpreter of Triton {version} does not run them: {error}"
    return ""


def why_not_attention() -> str:
    """The same of attention: CUDA tensors never come here where compiled kernels serve them."""
    if DEVICE == "cuda" and cuda.IS_DIRECT:
        return "compiled kernels serve this GPU; set FLASH_ATTN_BACKEND=triton"
    return why_not()


needs_triton = pytest.mark.skipif(
    bool(why_not_attention()), reason=why_not_attention() or "they run"
)
old_numbers = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
# What a test of the kernels is marked with: on a GPU it is one of `make test-gpu`.
on_device = [pytest.mark.gpu] if DEVICE == "cuda" else []
