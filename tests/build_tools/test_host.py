"""The host library without a GPU: loading, choosing, launching and failing, on a stub driver."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from native_tools import (
    ROOT,
    Launch,
    Stub,
    launches,
    lay_out_kernels,
    lines_of,
    native,
    needs,
)

from build_tools.ninja import BuildError

PREAMBLE = """
import ctypes, sys, threading
host = ctypes.CDLL({host!r})
host.flash_last_error.restype = ctypes.c_char_p
FORWARD, FP16, BF16, FP8 = 0, 0, 1, 2
def say(status):
    print(status, host.flash_last_error().decode() if not status else "")
"""


def program(stub: Stub, text: str) -> str:
    return PREAMBLE.format(host=str(stub.host)) + text


def test_finds_the_narrowest_kernel_and_explains_what_there_is_not(
    stub: Stub, tmp_path: Path
) -> None:
    text = f"""
say(host.flash_open({str(stub.kernels)!r}.encode()))
say(host.flash_find(FORWARD, 72, BF16, 90, 0))
say(host.flash_find(FORWARD, 257, BF16, 90, 0))
say(host.flash_find(FORWARD, 64, BF16, 75, 0))
say(host.flash_find(99, 64, BF16, 90, 0))
"""
    child = stub.run(program(stub, text), tmp_path / "log")
    opened, found, too_wide, too_old, unknown = child.stdout.splitlines()
    assert (opened.strip(), found.strip()) == ("1", "1")
    assert too_wide.endswith(
        "no forward kernel for head dim 257, bf16, on cc 9.0: the widest of this build is 256"
    )
    assert too_old.endswith("on cc 7.5: flash_fwd_sm80_d64_bf16 was built for 8.0, 9.0, 8.0 (PTX)")
    assert "none of kind unknown" in unknown


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("", "index.txt is empty"),
        ("something else\n", "does not begin with"),
        ("flash-attn-kernels 1\nforward sm80 64\n", "line 2: a row has 8 words"),
        ("flash-attn-kernels 1\nsideways sm80 64 bf16 90 cubin f f\n", "unknown kind sideways"),
        ("flash-attn-kernels 1\nforward sm80 64 fp99 90 cubin f f\n", "unknown dtype fp99"),
        ("flash-attn-kernels 1\nforward sm99 64 bf16 90 cubin f f\n", "unknown family sm99"),
    ],
)
def test_a_broken_table_is_told_with_its_line(
    stub: Stub, tmp_path: Path, index: str, words: str
) -> None:
    (tmp_path / "index.txt").write_text(index, "utf-8")
    child = stub.run(
        program(stub, f"say(host.flash_open({str(tmp_path)!r}.encode()))"), tmp_path / "l"
    )
    assert words in child.stdout


def test_a_missing_driver_is_told_and_nothing_crashes(stub: Stub, tmp_path: Path) -> None:
    text = "print(host.flash_compute_capability(0)); say(0)"
    child = stub.run(program(stub, text), tmp_path / "log", LD_LIBRARY_PATH="")
    if child.stdout.startswith("0\n0 the CUDA driver library"):
        assert "libcuda.so.1 cannot be opened: is an NVIDIA driver installed?" in child.stdout
    else:
        pytest.skip("this machine has a CUDA driver")


def test_an_error_carries_the_words_of_the_driver(stub: Stub, tmp_path: Path) -> None:
    text = "print(host.flash_compute_capability(0)); say(0)"
    child = stub.run(program(stub, text), tmp_path / "log", STUB_NO_DEVICE="1")
    words = "cuInit: CUDA_ERROR_STUB (100): no CUDA-capable device is detected"
    assert child.stdout.splitlines() == ["0", f"0 {words}"]
    child = stub.run(
        program(stub, "print(host.flash_compute_capability(7)); say(0)"), tmp_path / "l"
    )
    assert "cuDeviceGet: CUDA_ERROR_STUB (101)" in child.stdout


RUN = """
from native_tools import ForwardHead
class Call(ctypes.Structure):
    _fields_ = [("head", ForwardHead), ("rest", ctypes.c_ubyte * 800)]
def plan_and_run(
    device, d=64, stream=77, splits=1, b=2, sq=300, sk=300, right=-1, margin=0, given=(),
    dtype=BF16, pages=(0, 0), window_left=-1, heads=(4, 2), total_q=0, dv=None, **rows
):
    # Only sizes matter to the plan; offsets are asked of the compiler below.
    call = Call()
    sizes = dict(b=b, sq=sq, sk=sk, hq=heads[0], hk=heads[1], d=d, dv=dv or d, cache_rows=b)
    for name, value in dict(
        sizes, window_left=window_left, window_right=right, sm_margin=margin, q_dtype=dtype,
        num_pages=pages[0], page_size=pages[1], total_q=total_q,
    ).items():
        ctypes.c_int32.from_buffer(call, OFFSETS[name]).value = value
    ctypes.c_float.from_buffer(call, OFFSETS["softmax_scale"]).value = 0.125
    for name in given:
        ctypes.c_uint64.from_buffer(call, OFFSETS[name]).value = 4096
    for name, value in rows.items():
        setattr(call.head, name, value)
    workspace = (ctypes.c_int64 * 9)()
    ok = host.flash_plan_forward(device, dtype, splits, ctypes.byref(call), workspace)
    next_tile, decodes, _, order = workspace[5:9]
    for name, size in (("next_tile", next_tile), ("line", order)):
        if size:
            ctypes.c_uint64.from_buffer(call, OFFSETS[name]).value = 4096
    run = host.flash_decode if decodes else host.flash_forward
    return ok and run(device, ctypes.c_void_p(stream), dtype, ctypes.byref(call))
"""


@pytest.fixture(scope="module")
def offsets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Offsets of fields of flash::ForwardParams, as the host's compiler lays them out."""
    folder = tmp_path_factory.mktemp("offsets")
    sizes = ("b", "sq", "sk", "cache_rows", "block_table", "num_pages", "page_size")
    sizes += ("seqused_k", "leftpad_k", "cu_seqlens_q", "total_q")
    fields = {name: f"seqs.{name}" for name in sizes}
    fields["rng_state"] = "scores.rng_state"
    fields["alibi_slopes"] = "scores.alibi_slopes"
    fields["window_left"] = "scores.window_left"
    fields["window_right"] = "scores.window_right"
    fields["softmax_scale"] = "scores.softmax_scale"
    of_call = ("hq", "hk", "d", "dv", "next_tile", "line", "sm_margin", "q_dtype")
    fields.update({name: name for name in of_call})
    rows = "".join(
        f'printf("{name} %d\\n", int(offsetof(flash::ForwardParams, {field})));'
        for name, field in fields.items()
    )
    source = folder / "offsets.cpp"
    head = '#include <stddef.h>\n#include <stdio.h>\n#include "host/flash.h"\n'
    source.write_text(f"{head}int main() {{ {rows} }}\n", "utf-8")
    command = [needs("g++"), f"-I{ROOT / 'csrc'}", str(source), "-o", str(folder / "offsets")]
    subprocess.run(command, check=True)
    told = subprocess.run([str(folder / "offsets")], capture_output=True, text=True, check=True)
    return {name: int(at) for name, at in map(str.split, told.stdout.splitlines())}


def run_calls(stub: Stub, log: Path, offsets: dict[str, int], text: str, **env: str) -> str:
    opened = f"OFFSETS = {offsets}\nsay(host.flash_open({str(stub.kernels)!r}.encode()))\n"
    child = stub.run(program(stub, RUN + opened + text), log, **env)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_a_call_is_launched_with_its_plan_on_the_callers_stream(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    log = tmp_path / "log"
    run_calls(stub, log, offsets, "say(plan_and_run(0)); say(plan_and_run(0))")
    first, second = launches(log)
    assert first == second
    assert (first.kernel, first.stream, first.context) == ("flash_fwd_sm80_d64_bf16", 77, 0)
    assert first.grid % (2 * 4) == 0
    assert len(lines_of(log, "load")) == len(lines_of(log, "retain")) == 1


def test_few_queries_over_many_keys_are_split_where_parts_can_be_merged(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    folder = tmp_path / "kernels"
    lay_out_kernels(folder)
    index = folder / "index.txt"
    kept = [x for x in index.read_text("utf-8").splitlines(True) if x[:6] != "decode"]
    without = "".join(x for x in kept if x[:7] != "combine")
    row = "combine common 0 bf16 90 cubin flash_combine_bf16 90.cubin\n"
    text = f"""OFFSETS = {offsets}
host.flash_open({str(folder)!r}.encode())
say(plan_and_run(0, splits=0, b=1, sq=1, sk=8192))
say(plan_and_run(0, splits=2, b=1, sq=1, sk=8192))
"""
    index.write_text(without + row, "utf-8")
    stub.run(program(stub, RUN + text), tmp_path / "log")
    automatic, merged, two, merged_two = launches(tmp_path / "log")
    assert automatic.grid > two.grid == 2 * 4
    # Four warps take one of four rows; of two parts, a row each.
    assert (merged.kernel, merged.grid, merged.block) == ("flash_combine_bf16", 4, 128)
    assert (merged_two.kernel, merged_two.grid, merged_two.block) == ("flash_combine_bf16", 1, 128)
    index.write_text(without, "utf-8")
    child = stub.run(program(stub, RUN + text), tmp_path / "log2")
    whole, asked = child.stdout.splitlines()
    assert whole.strip() == "1"
    assert launches(tmp_path / "log2")[0].grid == 4
    assert "none of kind combine" in asked


def test_few_queries_get_equal_shares_of_the_keys_or_the_parts_asked_for(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
say(plan_and_run(0, splits=0, b=2, sq=1, sk=8192))
say(plan_and_run(0, splits=0, b=300, sq=8, sk=100, given=["seqused_k"]))
say(plan_and_run(0, splits=0, b=2, sq=9, d=256, sk=8192))
say(plan_and_run(0, splits=3, b=5, sq=1, sk=8192))
say(plan_and_run(0, splits=3, b=5, sq=1, sk=129, given=["seqused_k"]))
say(plan_and_run(0, splits=1, b=5, sq=33, sk=8192))
say(plan_and_run(0, splits=1, b=5, sq=1, sk=64))
"""
    told = run_calls(stub, tmp_path / "log", offsets, text)
    assert {line.strip() for line in told.splitlines()} == {"1"}
    one, many, wide, parts, few, *others = launches(tmp_path / "log")
    # Two heads of keys, so two queries are four rows; a CTA a multiprocessor, or clusters.
    assert (one.kernel, one.grid, one.block) == ("flash_fwd_decode_d64_bf16", 8 * 16, 256)
    assert (many.kernel, many.grid) == ("flash_fwd_decode_d64_bf16", 132)
    assert (wide.kernel, wide.grid) == ("flash_fwd_decode_wide_d256_bf16", 132)
    # 129 keys are two blocks.
    assert (parts.grid, few.grid) == (3 * 2 * 5, 2 * 2 * 5)
    # More rows than a tile has, or few keys and no cache.
    assert {x.kernel for x in others} == {"flash_fwd_sm80_d64_bf16"}


def test_one_sequence_gets_clusters_that_merge_its_parts(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
say(plan_and_run(0, splits=0, b=1, sq=1, sk=8192))
say(plan_and_run(0, splits=0, b=1, sq=1, sk=4096))
say(plan_and_run(0, splits=5, b=1, sq=1, sk=8192))
"""
    told = run_calls(stub, tmp_path / "log", offsets, text)
    assert {line.strip() for line in told.splitlines()} == {"1"}
    # For both heads of keys four clusters of those that the device holds; or one, if it has
    # enough with few blocks a CTA.
    assert [x.grid for x in launches(tmp_path / "log")] == [2 * 4 * 16, 2 * 16, 2 * 5]
    assert lines_of(tmp_path / "log", "cluster") == ["cluster flash_fwd_decode_d64_bf16 16"] * 2
    # Larger ones would leave some of twenty multiprocessors idle: five of two CTAs for each head.
    run_calls(stub, tmp_path / "few", offsets, text, STUB_SMS="20")
    assert launches(tmp_path / "few")[0].grid == 2 * 5 * 2


def test_few_queries_leave_multiprocessors_to_others(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = "".join(
        f"say(plan_and_run(0, splits=0, b={b}, sq=1, sk=8192, margin={margin}))\n"
        for b, margin in ((300, 32), (300, 1000), (1, 20), (1, 130))
    )
    run_calls(stub, tmp_path / "log", offsets, text)
    # Seven clusters of 8 for each of two heads; two multiprocessors hold no cluster for each.
    assert [x.grid for x in launches(tmp_path / "log")] == [100, 1, 2 * 7 * 8, 2]


def test_several_sequences_get_a_cluster_for_each_head(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    sizes = ((32, 1024), (16, 4096), (24, 4096), (4, 8192), (4, 16640), (3, 1024), (40, 1024))
    text = "".join(f"say(plan_and_run(0, splits=0, b={b}, sq=1, sk={sk}))\n" for b, sk in sizes)
    run_calls(stub, tmp_path / "log", offsets, text)
    # Whether they suit is found out on the device: else CTAs have other shares.
    names = [f"cluster flash_fwd_decode_d64_bf16 {size}" for size in (2, 4, 16, 16)]
    assert lines_of(tmp_path / "log", "cluster") == names
    assert [x.grid for x in launches(tmp_path / "log")] == [132, 132, 132, 128, 132, 128, 132]


@pytest.mark.parametrize(("archs", "overlaps"), [(("90",), True), (("80+ptx",), False)])
def test_a_launch_overlaps_only_where_the_code_waits_by_itself(
    stub: Stub, tmp_path: Path, offsets: dict[str, int], archs: tuple[str, ...], overlaps: bool
) -> None:
    # PTX of an earlier architecture has no instruction for it.
    folder = tmp_path / "kernels"
    lay_out_kernels(folder, archs)
    text = f"""OFFSETS = {offsets}
host.flash_open({str(folder)!r}.encode())
say(plan_and_run(0, splits=0, b=1, sq=1, sk=8192)); say(plan_and_run(0))
"""
    stub.run(program(stub, RUN + text), tmp_path / "log")
    decode, forward = launches(tmp_path / "log")
    assert (decode.kernel, forward.kernel) == (
        "flash_fwd_decode_d64_bf16",
        "flash_fwd_sm80_d64_bf16",
    )
    programmatic = "attribute flash_fwd_decode_d64_bf16 6"
    assert lines_of(tmp_path / "log", "attribute") == [programmatic] * overlaps


def test_splits_fit_the_keys_and_the_device(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
def ctas(**sizes):
    say(plan_and_run(0, sq=40, **sizes))
ctas(splits=0, b=1, sk=200)
ctas(splits=0, b=33, sk=8192)
ctas(splits=0, b=8, sk=8192)
ctas(splits=64, b=1, sk=300)
ctas(splits=5, b=1, sk=0)
"""
    told = run_calls(stub, tmp_path / "log", offsets, text)
    assert {line.strip() for line in told.splitlines()} == {"1"}
    grids = [x.grid for x in launches(tmp_path / "log") if x.kernel.startswith("flash_fwd")]
    few_keys, full, part, many, none = grids
    # The stub has 132 multiprocessors; 33 sequences of 4 heads take them all.
    assert (few_keys, full) == (4, 33 * 4)
    assert part % 32 == 0
    assert 0.85 * 132 <= part <= 2 * 132
    # 300 keys are 3 blocks of 128: a fourth part would have none.
    assert (many, none) == (3 * 4, 4)


def test_many_threads_load_a_kernel_once(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    log = tmp_path / "log"
    text = """
results = []
threads = [threading.Thread(target=lambda: results.append(plan_and_run(0))) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(results)
"""
    told = run_calls(stub, log, offsets, text)
    assert told.splitlines()[-1] == str([1] * 8)
    assert len(lines_of(log, "load")) == 1
    # A fresh thread has no context: each launch found the primary one bound.
    assert [launch.context for launch in launches(log)] == [0] * 8


def test_the_callers_context_comes_back(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
driver = ctypes.CDLL("libcuda.so.1")
current = ctypes.c_void_p()
for before in (None, 0x1000, 0x1001):
    driver.cuCtxSetCurrent(ctypes.c_void_p(before))
    plan_and_run(0)
    driver.cuCtxGetCurrent(ctypes.byref(current))
    print(current.value)
"""
    told = run_calls(stub, tmp_path / "log", offsets, text).splitlines()[1:]
    # Without one before, the primary context stays, as the CUDA runtime leaves it.
    assert [int(x) for x in told] == [0x1000, 0x1000, 0x1001]


def test_a_second_device_has_its_own_context_and_uses_the_same_code(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    log = tmp_path / "log"
    run_calls(stub, log, offsets, "say(plan_and_run(0)); say(plan_and_run(1))")
    assert [launch.context for launch in launches(log)] == [0, 1]


@pytest.mark.parametrize(("cc", "loaded"), [("90", 1), ("89", 1), ("120", 1)])
def test_each_device_gets_an_image_that_runs_there(
    stub: Stub, tmp_path: Path, offsets: dict[str, int], cc: str, loaded: int
) -> None:
    log = tmp_path / "log"
    told = run_calls(stub, log, offsets, "say(plan_and_run(0))", STUB_CC=cc)
    assert told.splitlines()[-1].strip() == "1"
    assert len(lines_of(log, "load")) == loaded


def test_code_that_the_driver_refuses_gives_way_to_ptx(
    tmp_path: Path, stub: Stub, offsets: dict[str, int]
) -> None:
    folder, log = tmp_path / "kernels", tmp_path / "log"
    lay_out_kernels(folder)
    (folder / "90.cubin").write_text("wrong-arch", "utf-8")
    text = f"""OFFSETS = {offsets}
say(host.flash_open({str(folder)!r}.encode()))
say(plan_and_run(0))
"""
    child = stub.run(program(stub, RUN + text), log)
    assert child.stdout.splitlines()[-1].strip() == "1", child.stdout + child.stderr
    assert (len(lines_of(log, "load")), len(lines_of(log, "unload"))) == (2, 1)
    (folder / "80+ptx.ptx").write_text("wrong-arch", "utf-8")
    child = stub.run(program(stub, RUN + text), log)
    assert re.search(r"loading .*80\+ptx\.ptx: CUDA_ERROR_NO_BINARY_FOR_GPU \(209\)", child.stdout)


def test_a_cut_off_installation_names_the_missing_file(
    tmp_path: Path, stub: Stub, offsets: dict[str, int]
) -> None:
    folder = tmp_path / "kernels"
    lay_out_kernels(folder, ("90",))
    (folder / "90.cubin").unlink()
    text = f"OFFSETS = {offsets}\nhost.flash_open({str(folder)!r}.encode())\nsay(plan_and_run(0))"
    child = stub.run(program(stub, RUN + text), tmp_path / "log")
    assert "kernels/90.cubin cannot be read" in child.stdout


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that has Hopper's own kernels too."""
    folder = tmp_path_factory.mktemp("hopper") / "kernels"
    lay_out_kernels(folder, ("80", "90", "90a", "80+ptx"))
    return folder


def run_with(
    kernels: Path, stub: Stub, log: Path, offsets: dict[str, int], text: str, **env: str
) -> list[Launch]:
    opened = f"OFFSETS = {offsets}\nhost.flash_open({str(kernels)!r}.encode())\n"
    child = stub.run(program(stub, RUN + opened + text), log, **env)
    assert {line.strip() for line in child.stdout.splitlines()} == {"1"}, child.stdout
    return launches(log)


def test_hopper_runs_its_own_kernel_on_all_multiprocessors(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = "say(plan_and_run(0, d=128)); say(plan_and_run(0, d=128, sq=3000, sk=3000))"
    few, many = run_with(hopper, stub, tmp_path / "log", offsets, text)
    assert few.kernel == many.kernel == "flash_fwd_sm90_d128_bf16"
    # 2 sequences of 4 heads have 3 tiles of 128 rows each, or 24; there are 132 multiprocessors.
    assert (few.grid, many.grid, few.block) == (2 * 4 * 3, 132, 3 * 128)
    # Q and O, K and V twice each, in 128 columns of 2 bytes; two floats a row, and barriers.
    assert few.smem == (2 * 128 + 2 * 2 * 128) * 128 * 2 + 2 * 128 * 4 + 1024


def test_causal_calls_at_head_dim_256_run_in_pairs(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
def call(sq=1024, right=0, **options):
    say(plan_and_run(0, d=256, sq=sq, sk=1024, right=right, **options))
call()
call(b=20)
call(b=20, margin=1)
# One is left without another, or is the only one; all rows see the same keys; nobody knows how
# many rows a sequence has.
call(sq=1100)
call(margin=131)
call(right=-1)
call(given=["cu_seqlens_q"])
"""
    found = run_with(hopper, stub, tmp_path / "log", offsets, text)
    assert {x.kernel for x in found[:-1]} == {"flash_fwd_sm90_d256_bf16"}
    assert [x.grid for x in found[:5]] == [2 * 4 * 8, 132, 130, 2 * 4 * 9, 1]
    pair = "cluster flash_fwd_sm90_d256_bf16 2"
    assert lines_of(tmp_path / "log", "cluster") == [pair] * 3


def test_who_takes_a_call_in_parts_decides_into_how_many(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    # Three tiles of 128 rows, or, of many heads, two of 256. One block of keys cannot be split.
    text = """
call = lambda **more: say(plan_and_run(0, **more))
call(splits=0, b=1, sk=8192)
call(splits=5, b=1, sk=8192)
call(splits=4, b=40, sk=60)
call(splits=2, b=40, sk=600)
"""
    found = run_with(hopper, stub, tmp_path / "log", offsets, text)
    parts = [(x.kernel, x.grid) for x in found if x.kernel != "flash_combine_bf16"]
    scored, whole = "flash_fwd_sm90_scored_d64_bf16", "flash_fwd_sm90_d64_bf16"
    assert parts == [(scored, 11 * 4 * 3), (scored, 5 * 4 * 3), (whole, 132), (scored, 132)]
    assert len(found) == len(parts) + 3


def test_wide_tiles_are_for_long_calls(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
call = lambda d, length, **more: say(plan_and_run(0, d=d, sq=length, sk=length, **more))
call(64, 2048)
call(64, 2047)
call(64, 4095, right=0, b=8)
call(64, 4096, right=0)
call(64, 4096, window_left=0)
call(72, 2047)
call(72, 2048)
call(72, 4095, right=0)
call(72, 4096, right=0)
call(128, 4095)
call(128, 4096)
call(128, 8191, right=0)
call(128, 8192, right=0)
call(128, 8192, window_left=0)
call(136, 8192)
"""
    wide, *others = run_with(hopper, stub, tmp_path / "log", offsets, text)
    assert (wide.kernel, wide.block) == ("flash_fwd_sm90_wide_d64_bf16", 4 * 128)
    assert wide.grid == 2 * 4 * 11  # 2048 rows in tiles of 192
    assert wide.smem == (3 * 192 + 2 * 4 * 128) * 64 * 2 + 2 * 192 * 4 + 1024
    assert [x.kernel.removeprefix("flash_fwd_") for x in others] == [
        "sm90_scored_d64_bf16",
        "sm90_d64_bf16",
        "sm90_wide_d64_bf16",
        "sm90_wide_d64_bf16",
        "sm90_d96_bf16",
        "sm90_wide_d96_bf16",
        "sm90_d96_bf16",
        "sm90_wide_d96_bf16",
        "sm90_d128_bf16",
        "sm90_wide_d128_bf16",
        "sm90_d128_bf16",
        "sm90_wide_d128_bf16",
        "sm90_d128_bf16",
        "sm90_d192_bf16",
    ]


def test_a_narrow_v_has_a_kernel_of_its_own(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
call = lambda d, dv, **more: say(plan_and_run(0, d=d, dv=dv, sq=2000, sk=2000, **more))
call(192, 128)
call(136, 64)
call(192, 136)
call(128, 64)
call(192, 128, splits=3)
call(192, 128, given=["block_table"], pages=(100, 64))
call(192, 128, given=["alibi_slopes"])
"""
    narrow, *others = run_with(hopper, stub, tmp_path / "log", offsets, text)
    assert narrow.kernel == "flash_fwd_sm90_narrow_d192_bf16"
    # Q, two blocks of K and of V, room for Q beside O.
    blocks = 2 * 96 * (192 + 128)
    assert narrow.smem == (128 * 192 + blocks + 128 * 192) * 2 + 2 * 128 * 4 + 1024
    assert [x.kernel.removeprefix("flash_fwd_") for x in others if "combine" not in x.kernel] == [
        "sm90_narrow_d192_bf16",
        "sm90_d192_bf16",
        "sm90_d128_bf16",
        "sm90_scored_d192_bf16",
        "sm90_d192_bf16",
        "sm90_scored_d192_bf16",
    ]


def test_heads_share_tiles_where_queries_are_few(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
call = lambda **more: say(plan_and_run(0, d=128, **more))
packed = dict(given=['cu_seqlens_q'], heads=(32, 8))
call(sq=20, heads=(16, 2))
call(sq=9, heads=(14, 2))
call(sq=20, heads=(16, 2), given=['alibi_slopes'])
call(sq=300)
call(b=32, sq=512, total_q=31 + 512, **packed)
call(b=8, sq=1000, total_q=8 * 900, **packed)
"""
    found = run_with(hopper, stub, tmp_path / "log", offsets, text)
    shapes = [
        (x.kernel.split("_")[3], x.grid, *struct.unpack_from("<13Q", x.params)[9:13:3])
        for x in found
        if x.kernel.startswith("flash_fwd")
    ]
    # Rows and heads of a box of Q, of the 64 rows of a consumer; a tile has two.
    assert shapes == [
        ("scored", 2 * 2 * 2, 8, 8),
        ("scored", 1 * 2 * 2, 9, 7),
        ("scored", 1 * 16 * 2, 64, 1),
        ("d128", 3 * 4 * 2, 64, 1),
        ("scored", 132, 16, 4),
        ("d128", 132, 64, 1),
    ]


def test_tiles_of_four_consumers_are_for_two_rounds_of_the_device(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
say(plan_and_run(0, b=33))
say(plan_and_run(0, b=32))
say(plan_and_run(0, b=80, sq=255))
say(plan_and_run(0, b=33, given=['alibi_slopes']))
"""
    tall, *others = run_with(hopper, stub, tmp_path / "log", offsets, text)
    assert (tall.kernel, tall.block) == ("flash_fwd_sm90_d64_bf16", 5 * 128)
    assert tall.smem == (3 * 256 + 2 * 4 * 64) * 64 * 2 + 2 * 256 * 4 + 1024
    assert {x.kernel for x in others} == {"flash_fwd_sm90_scored_d64_bf16"}


def test_fp8_blocks_of_many_keys_are_for_long_calls_of_their_head_dim(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    long = ((128, 1024, -1), (104, 4096, -1), (128, 2048, 0))
    short = ((128, 1023, -1), (128, 2047, 0), (96, 4096, -1), (64, 4096, -1))
    text = "".join(
        f"say(plan_and_run(0, dtype=FP8, d={d}, sk={sk}, right={right}))\n"
        for d, sk, right in (*long, *short)
    )
    kernels = [x.kernel for x in run_with(hopper, stub, tmp_path / "log", offsets, text)]
    wide = "flash_fwd_sm90_fp8_wide_d128_e4m3"
    others = [f"flash_fwd_sm90_fp8_d{d}_e4m3" for d, _, _ in short]
    assert kernels == [wide] * len(long) + others


def test_tiles_that_are_shared_leave_multiprocessors_to_others(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = "".join(
        f"say(plan_and_run(0, b={b}, d=128, margin={margin}))\n"
        for b, margin in ((20, 0), (20, 32), (20, 1000), (8, 40), (2, 40))
    )
    grids = [x.grid for x in run_with(hopper, stub, tmp_path / "log", offsets, text)]
    # Of 132; b calls of 4 heads have 3 tiles each, and what fits is not shared.
    assert grids == [132, 100, 1, 92, 2 * 4 * 3]


def test_sequences_of_many_keys_come_first_where_that_pays(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
def call(given=["seqused_k"], b=24, sk=8192, **options):
    say(plan_and_run(0, d=128, b=b, sk=sk, given=given, **options))
call()
call(given=["cu_seqlens_q"], total_q=6000, sk=300)
# One sequence; all as long as one another; too short for another launch; each tile has its CTA.
call(b=1, sq=8192)
call(given=[])
call(sk=1024)
call(b=8)
"""
    found = run_with(hopper, stub, tmp_path / "log", offsets, text)
    kernels = [x.kernel for x in found]
    assert kernels[:4] == 2 * ["flash_fill_bf16", "flash_fwd_sm90_d128_bf16"]
    # Those begin beside the end of the kernel in front, and wait for it by themselves.
    programmatic = [f"attribute {x} 6" for x in kernels if x != "flash_fill_bf16"]
    assert lines_of(tmp_path / "log", "attribute") == programmatic
    assert "flash_fill_bf16" not in kernels[4:]
    # A warp for each of 24 sequences and one for the line, eight in a CTA.
    assert [found[i].grid for i in (0, 2)] == [4, 4]


def test_tensor_maps_tell_sizes_and_strides(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
from native_tools import Rows
q = Rows(0x10000, 300 * 4 * 96, 4 * 96, 96)
kv = Rows(0x20000, 200 * 2 * 96, 96, 200 * 96)
say(plan_and_run(0, d=96, sq=300, sk=200, q=q, k=kv, v=kv, o=q))
say(plan_and_run(0, d=96, b=1, sq=1, sk=200, q=Rows(0x10000, 3, 5, 96), k=kv, v=kv, o=q))
"""
    launch, one = run_with(hopper, stub, tmp_path / "log", offsets, text)
    q, k, _, o = (struct.unpack_from("<12Q", launch.params, 128 * i) for i in range(4))
    bf16, swizzle_128 = 9, 3
    # Address; columns, rows, heads, batch; strides of the last three in bytes; columns and rows of
    # a box.
    sizes_q, strides_q = (96, 300, 4, 2), (2 * 4 * 96, 2 * 96, 2 * 300 * 4 * 96)
    assert q == o == (0x10000, *sizes_q, *strides_q, 64, 64, bf16, swizzle_128)
    sizes_k, strides_k = (96, 200, 2, 2), (2 * 96, 2 * 200 * 96, 2 * 200 * 2 * 96)
    assert k == (0x20000, *sizes_k, *strides_k, 64, 128, bf16, swizzle_128)
    # Strides of dimensions of one may be anything, and the driver takes multiples of 16 only.
    assert struct.unpack_from("<12Q", one.params)[5:8] == (16, 2 * 96, 16)


def test_tensor_maps_of_pages_have_boxes_that_divide_page_and_block(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int]
) -> None:
    text = """
from native_tools import Rows
for size in (8, 24, 48, 256):
    kv = Rows(0x20000, size * 2 * 96, 2 * 96, 96)
    say(plan_and_run(0, d=96, sk=480, pages=(70, size), given=['block_table'], k=kv, v=kv))
"""
    boxes = []
    for launch in run_with(hopper, stub, tmp_path / "log", offsets, text):
        *k, box_cols, box_rows, _, _ = struct.unpack_from("<12Q", launch.params, 128)
        size = k[2]
        assert k == [0x20000, 96, size, 2, 70, 2 * 2 * 96, 2 * 96, 2 * size * 2 * 96]
        boxes.append((size, box_cols, box_rows))
    assert boxes == [(8, 64, 8), (24, 64, 8), (48, 64, 16), (256, 64, 128)]


@pytest.mark.parametrize(
    ("options", "cc"),
    [
        ("given=['block_table'], pages=(9, 20)", "90"),
        ("given=['block_table', 'leftpad_k'], pages=(9, 16)", "90"),
        ("given=['block_table'], pages=(0, 16)", "90"),
        ("given=['rng_state']", "90"),
        ("sk=0", "90"),
        ("k=Rows(4096, 38400, 128, 0)", "90"),  # one head of keys, shown twice
        ("k=Rows(4096, 38400, 128, 68)", "90"),
        ("k=Rows(4104, 38400, 128, 64)", "90"),
        ("", "89"),
        ("", "100"),
    ],
)
def test_what_hoppers_kernel_does_not_do_stays_with_the_others(
    stub: Stub, hopper: Path, tmp_path: Path, offsets: dict[str, int], options: str, cc: str
) -> None:
    text = f"from native_tools import Rows\nsay(plan_and_run(0, {options}))"
    first, *_ = run_with(hopper, stub, tmp_path / "log", offsets, text, STUB_CC=cc)
    assert first.kernel == "flash_fwd_sm80_d64_bf16"


def test_the_kernel_of_a_call_is_known_without_a_device(
    stub: Stub, hopper: Path, tmp_path: Path
) -> None:
    # Masks 1, scores that are changed 2, dropout 4, pages 8, qv 16, as csrc/host/api.h has them.
    text = f"""
host.flash_open({str(hopper)!r}.encode())
host.flash_kernel_of.restype = ctypes.c_char_p
for head_dim, cc, features in (
    (64, 90, 0), (64, 90, 1), (64, 90, 2), (64, 90, 4), (64, 90, 8), (100, 90, 3), (64, 80, 0),
):
    print(host.flash_kernel_of(0, head_dim, 1, cc, features).decode())
for head_dim, cc, features in ((512, 90, 0), (128, 90, 16), (512, 80, 0), (520, 90, 0)):
    print((host.flash_kernel_of(0, head_dim, 1, cc, features) or b"None").decode())
for head_dim, features in ((192, 1), (96, 4)):
    print(host.flash_kernel_of(4, head_dim, 1, 90, features).decode())
print(host.flash_kernel_of(9, 128, 1, 90, 9).decode())
"""
    child = stub.run(program(stub, text), tmp_path / "log")
    assert child.stdout.split() == [
        "flash_fwd_sm90_wide_d64_bf16",
        "flash_fwd_sm90_wide_d64_bf16",
        "flash_fwd_sm90_scored_d64_bf16",
        "flash_fwd_sm80_d64_bf16",
        "flash_fwd_sm90_wide_d64_bf16",
        "flash_fwd_sm90_scored_d128_bf16",
        "flash_fwd_sm80_d64_bf16",
        "flash_fwd_sm90_latent_d512_bf16",
        "flash_fwd_sm90_latent_d256_bf16",
        "None",
        "None",
        "flash_bwd_sm90_d192_bf16",
        "flash_bwd_sm80_d96_bf16",
        "flash_fwd_decode_d128_bf16",
    ]


def test_a_driver_that_refuses_hoppers_kernel_gets_another_and_is_asked_once(
    stub: Stub, tmp_path: Path, offsets: dict[str, int]
) -> None:
    folder, log = tmp_path / "kernels", tmp_path / "log"
    lay_out_kernels(folder, ("80", "90", "90a", "80+ptx"))
    (folder / "90a.cubin").write_text("wrong-arch", "utf-8")
    found = run_with(folder, stub, log, offsets, "for _ in range(2): say(plan_and_run(0, b=40))")
    assert [x.kernel for x in found] == ["flash_fwd_sm80_d64_bf16"] * 2
    # Any of five widths would serve, of two families; none is tried twice.
    assert (len(lines_of(log, "load")), len(lines_of(log, "unload"))) == (10 + 1, 10)


def test_the_compiler_may_have_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env NOTHING= '{needs('g++')}' -g0")
    assert native.host(tmp_path / native.HOST_LIBRARY).exists()
    monkeypatch.setenv("CXX", "no-such-program g++")
    with pytest.raises(BuildError, match=r"CXX is set to 'no-such-program g\+\+', and there is no"):
        native.compiler()


@pytest.mark.parametrize("cxx", ["g++", "clang++"])
def test_the_library_needs_nothing_but_libc(cxx: str, tmp_path: Path) -> None:
    library = native.host(tmp_path / native.HOST_LIBRARY, needs(cxx))
    told = subprocess.run(
        [needs("readelf"), "--wide", "-d", "--dyn-syms", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", told))
    allowed = {"libc.so.6", "libdl.so.2", "libpthread.so.0", "libm.so.6", "ld-linux-x86-64.so.2"}
    assert needed <= allowed
    assert "GLIBCXX" not in told
    exported = re.findall(r"(?:FUNC|OBJECT) +GLOBAL +DEFAULT +\d+ (\w+)$", told, re.MULTILINE)
    assert exported
    assert [name for name in exported if not name.startswith("flash_")] == []


def test_the_library_builds_for_windows(tmp_path: Path) -> None:
    library = native.host(tmp_path / "flash_attn_host.dll", needs("x86_64-w64-mingw32-g++"))
    objdump = needs("x86_64-w64-mingw32-objdump")
    told = subprocess.run([objdump, "-p", str(library)], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"DLL Name: (\S+)", told.stdout))
    assert needed <= {"KERNEL32.dll", "msvcrt.dll"}
