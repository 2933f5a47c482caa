"""A kernel that has run once is launched again without Triton's search for it: with the arguments
that Triton would give it. Compiled for a GPU, here or not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn.backends import triton

PROGRAM = """
import torch
from triton.runtime.jit import JITFunction
from triton_without_gpu import LAUNCHED, install

install()
import flash_attn

told = lambda x: (x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x
q, k, v = (torch.zeros(1, 40, 2, 16, dtype=torch.float16, requires_grad=True) for _ in range(3))


def call(q, k, v):
    LAUNCHED.clear()
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    return [[told(x) for x in given] for given in LAUNCHED]


first = call(q, k, v)
assert len(first) == 4 and all(len(given) > 10 for given in first), first
searched = []
run = JITFunction.run
JITFunction.run = lambda self, *args, **more: searched.append(self) or run(self, *args, **more)
assert call(q, k, v) == first
assert not searched
other = torch.zeros(1, 40 * 2 * 16 + 1, dtype=torch.float16)[:, 1:].view(1, 40, 2, 16)
assert call(other.requires_grad_(), k, v) == first  # an address that 16 does not divide
assert len(searched) == 3, searched
"""


@pytest.mark.skipif(not triton.is_installed(), reason=triton.NOT_INSTALLED)
def test_a_second_launch_passes_what_the_first_passed(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    settings = {"TRITON_INTERPRET": "0", "FLASH_ATTN_BACKEND": "triton", "PYTHONPATH": path}
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **settings, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
