"""Which backward kernel a call gets on Hopper and its launch, on a driver that runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import emulated
import pytest
from native_tools import Launch, Stub, launches

PROGRAM = """
def backward(d, sq=300, sk=300, hk=2, window=(-1, -1), p=0.0, deterministic=False, change=None):
    q, k = make(2, sq, 4, d), make(2, sk, hk, d)
    if change:
        k = change(k)
    lse = torch.zeros(2, 4, sq)
    state = torch.zeros(2, dtype=torch.int64) if p else None
    grads = [torch.empty_like(x) for x in (q, k, k)]
    torch.ops.flash_attn_cuda.backward.default.redispatch(
        CUDA, q, q, k, k, q, lse, *grads, *[None] * 6, p, 0.1, False, *window, 0.0, None,
        deterministic, state)
"""


Launched = Callable[..., list[Launch]]


@pytest.fixture
def launched(machine: Stub, stub: Stub, tmp_path: Path) -> Launched:
    """The launches of calls, on 132 multiprocessors."""

    def run(*calls: str, **environment: str) -> list[Launch]:
        log = tmp_path / "log"
        emulated.run(machine, stub, log, PROGRAM + "\n".join(calls), **environment)
        return launches(log)

    return run


def test_a_call_has_three_kernels_of_one_family(launched: Launched) -> None:
    found = launched("backward(80)")
    names = [launch.kernel for launch in found]
    assert names == [f"flash_{kind}_bf16" for kind in ("delta", "bwd_sm90_d96", "convert_sm90_d96")]
    # 2 sequences of 4 heads have 300 rows in tiles of 64, or 300 keys of 2 heads in blocks of 128.
    assert [launch.grid for launch in found[1:]] == [2 * 2 * 3, 2 * 4 * 5]
    assert found[1].block == 3 * 128


@pytest.mark.parametrize(
    ("d", "block_m", "block_n", "p_bytes"),
    [(64, 128, 128, 0), (128, 64, 128, 0), (256, 64, 64, 64 * 64 * 4)],
)
def test_shared_memory_is_what_the_page_says(
    launched: Launched, d: int, block_m: int, block_n: int, p_bytes: int
) -> None:
    _, main, _ = launched(f"backward({d})")
    # K, V; Q and dO twice each; dS twice; lse and delta twice; bounds of keys; barriers.
    operands = 2 * (block_n + 2 * block_m) * d * 2
    assert main.smem == (
        operands + 2 * block_m * block_n * 2 + p_bytes + 2 * block_m * 8 + block_n * 8 + 512
    )
    assert main.smem <= 227 * 1024


def test_equal_blocks_of_keys_are_dealt_out_where_loads_overlap(launched: Launched) -> None:
    calls = [
        f"backward({d}, sk=5000, {options})"
        for d in (128, 256)
        for options in ("", "window=(-1, 0)", "deterministic=True")
    ]
    grids = [launch.grid for launch in launched(*calls)[1::3]]
    assert grids == [132, 4 * 40, 4 * 40, 4 * 79, 4 * 79, 4 * 79]


@pytest.mark.parametrize(
    ("call", "cc"),
    [
        ("backward(64, p=0.1)", "90"),
        ("backward(64, sk=0)", "90"),
        ("backward(64, hk=1, change=lambda k: k.expand(2, 300, 2, 64))", "90"),
        ("backward(64)", "89"),
        ("backward(64)", "100"),
    ],
)
def test_what_hoppers_kernel_does_not_do_stays_with_the_others(
    launched: Launched, call: str, cc: str
) -> None:
    names = [launch.kernel for launch in launched(call, STUB_CC=cc)]
    # Without keys there is nothing to launch but what dQ needs.
    assert names[-1] == "flash_convert_sm80_d64_bf16"
    assert not any("sm90" in name for name in names)
