"""Which backward kernel a call gets on Hopper and its launch, on a driver that runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import emulated
import pytest
from native_tools import Launch, Stub, launches

PROGRAM = """
def backward(d, sq=300, sk=300, hk=2, window=(-1, -1), p=0.0, deterministic=False, change=None,
             used=None, scale=0.1, margin=0):
    q, k = make(2, sq, 4, d), make(2, sk, hk, d)
    if change:
        k = change(k)
    lse = torch.zeros(2, 4, sq)
    state = torch.zeros(2, dtype=torch.int64) if p else None
    grads = [torch.empty_like(x) for x in (q, k, k)]
    used = used and torch.tensor(used, dtype=torch.int32)
    torch.ops.flash_attn_cuda.backward.default.redispatch(
        CUDA, q, q, k, k, q, lse, *grads, None, None, None, used, None, None, p, scale, False,
        *window, 0.0, None, deterministic, state, margin)
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
    # One of the warpgroups multiplies dQ.
    assert found[1].block == 4 * 128


def test_above_128_the_last_one_computes_dq(launched: Launched) -> None:
    found = launched("backward(160)")
    names = [launch.kernel for launch in found]
    assert names == [f"flash_{kind}_bf16" for kind in ("delta", "bwd_sm90_d192", "dq_sm90_d192")]
    # 300 keys in blocks of 64, 300 rows in tiles of 128.
    assert [launch.grid for launch in found[1:]] == [2 * 2 * 5, 2 * 4 * 3]
    assert found[2].block == 3 * 128


@pytest.mark.parametrize(
    ("d", "columns", "block_m", "block_n", "steps", "of_keys", "exchanged", "leaving"),
    [
        (64, 64, 128, 128, 2, 3, 2, 2 * 64 * 64),
        (96, 128, 64, 128, 2, 3, 2, 64 * 96),
        (128, 128, 64, 128, 2, 3, 2, 2 * 64 * 64),
        (192, 192, 64, 64, 3, 2, 4, 0),
        (256, 256, 64, 64, 2, 2, 4, 0),
    ],
)
def test_shared_memory_is_what_the_page_says(
    launched: Launched,
    d: int,
    columns: int,
    block_m: int,
    block_n: int,
    steps: int,
    of_keys: int,
    exchanged: int,
    leaving: int,
) -> None:
    _, main, _ = launched(f"backward({d})")
    # K, twice where dQ is multiplied later, and V; Q and dO, lse and delta of some steps; dS, or P
    # in float, twice; dQ, all or what two consumers have of it, and zeros for its sums; bounds of
    # keys; barriers.
    zeros = 512 if d <= 128 else 0
    operands = (of_keys * block_n + 2 * steps * block_m) * columns * 2
    passed_on = 2 * block_m * block_n * exchanged + 4 * leaving
    assert main.smem == operands + passed_on + steps * block_m * 8 + block_n * 8 + zeros + 512
    assert main.smem <= 227 * 1024


def test_who_writes_the_first_sums_of_dq(launched: Launched) -> None:
    zeroed_before = {  # none: the first to come stores; a section: blocks of keys zero the next
        "backward(64, sq=1024, sk=2048, hk=4)": 2,  # 16 blocks: two heads fill the device
        "backward(128, sq=2048, sk=2048, hk=4, window=(-1, 0))": 2,
        "backward(128, sq=2048, sk=2048, hk=4, window=(-1, 0), deterministic=True)": 0,
        "backward(64, sq=2046, sk=2048, hk=4, window=(-1, 0))": 0,  # 1023 queries see a key
        "backward(64, sq=512, sk=2048)": 2,  # two of each of two heads
        "backward(64, sq=511, sk=2048)": 0,
        "backward(64, sq=1024, sk=897, hk=4)": 4,
        "backward(64, sq=1024, sk=896, hk=4)": 0,
        "backward(64, sq=1024, sk=2048, hk=4, used=[300, 7])": 0,
        "backward(192, sq=1024, sk=2048, hk=4)": 8,
    }
    found = launched(*zeroed_before, STUB_SMS="40")
    deltas = [launch.params for launch in found if "delta" in launch.kernel]
    heads_zeroed = [int.from_bytes(params[-8:-4], "little") for params in deltas]
    assert heads_zeroed == list(zeroed_before.values())  # in front of the last of BackwardParams


def test_multiprocessors_are_left_to_others(launched: Launched) -> None:
    calls = [
        f"backward({d}, sq=5000, sk=5000, margin={margin})"
        for d, margin in ((128, 32), (192, 32), (64, 1000))
    ]
    found = launched(*calls)
    # One of them is left to the conversion of dQ, which has up to eight CTAs on each.
    assert [launch.grid for launch in found[1::3]] == [99, 100, 1]
    assert [launch.grid for launch in found[2::3]] == [8 * 79, 100, 8]


@pytest.mark.parametrize(("d", "buffers"), [(192, 4), (256, 3)])
def test_so_is_that_of_the_kernel_of_dq(launched: Launched, d: int, buffers: int) -> None:
    last = launched(f"backward({d})")[2]
    assert last.smem == (2 * 128 + buffers * 64) * d * 2 + 512
    assert last.smem <= 227 * 1024


def test_blocks_of_keys_are_shared_where_loads_overlap(launched: Launched) -> None:
    calls = [
        f"backward({d}, sq=5000, sk=5000, {options})"
        for d in (128, 192, 256)
        for options in ("", "window=(-1, 0)", "deterministic=True")
    ]
    found = launched(*calls)
    # Of 132 multiprocessors, one or two are left to the conversion of dQ.
    blocks = [launch.grid for launch in found[1::3]]
    assert blocks == [131, 130, 131] + [132] * 3 + [4 * 79] * 3
    assert [launch.grid for launch in found[2::3]] == [8 * 79] * 3 + [132] * 6


def test_dq_is_converted_by_as_many_as_keep_up_with_the_others(launched: Launched) -> None:
    calls = [
        f"backward({d}, sq={length}, sk={length}, hk=4, {options})"
        for d, length, options in (
            (128, 5000, "window=(1023, 0)"),
            (128, 16384, ""),
            (64, 16384, ""),
            (64, 4096, "window=(-1, 0)"),
            (64, 100, ""),
        )
    ]
    found = launched(*calls)
    # For rows that see 1024 keys 4, 2048 of head dim 64 3, 16384 none. Few blocks all run at once.
    assert [launch.grid for launch in found[1::3]] == [128, 132, 132, 129, 8]
    assert [launch.grid for launch in found[2::3]] == [8 * 79, 8 * 132, 8 * 132, 8 * 64, 16]


def test_blocks_of_queries_that_differ_in_length_go_to_who_is_free(launched: Launched) -> None:
    found = launched("backward(192, sq=5000, sk=5000, used=[5000, 70])")
    assert [launch.grid for launch in found[1:3]] == [4 * 79, 8 * 40]


@pytest.mark.parametrize(
    ("call", "cc"),
    [
        ("backward(64, p=0.1)", "90"),
        ("backward(64, sk=0)", "90"),
        ("backward(64, scale=1e-35)", "90"),
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
