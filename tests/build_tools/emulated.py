"""Kernels that run on a CPU: the device code itself, on the emulator of `emulator/`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Optional

from native_tools import ROOT, Stub, codegen, lay_out_kernels, lines_of, native, needs

HERE = Path(__file__).parent
FAMILIES = (
    "sm90",
    "sm90_wide",
    "sm90_narrow",
    "sm90_scored",
    "sm90_fp8_wide",
    "sm90_fp8",
    "sm90_fp8_scored",
)
# Widths of V of attention over a latent: of four buffers of keys, and of two.
LATENT_VALUE_DIMS = (256, 512)
# Four consumers; Q in registers; one buffer of Q. Wide tiles of every head dim besides.
HEAD_DIMS = (64, 128, 256)
# Steps of 128 queries; dQ by a third consumer; steps of 64; consumers that share keys, with
# products a step late and without.
BACKWARD_HEAD_DIMS = (64, 96, 128, 192, 256)
# Panels of 32 columns; of 64; chunks of Q that threads have no equal shares of; Q in shared memory.
DECODE_HEAD_DIMS = (96, 128, 192, 256)
# Panels of 32 columns, once and thrice; of 64; Q in shared memory.
FP8_DECODE_HEAD_DIMS = (64, 128, 192, 256)

# What programs of cases begin and end with.
HEAD = """
import json, math, sys, torch
sys.path.insert(0, {tests!r})
from compare import check
from oracle import attention
from flash_attn.backends import cuda
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
DTYPE = torch.bfloat16

def make(*shape):
    return torch.randn(shape).to(DTYPE)

def judge(got, oracle):
    exact, rough = oracle(torch.float64), oracle(DTYPE)
    check("out", got[0], exact[0], rough[0])
    check("lse", got[1], exact[1], rough[1], atol=1e-4)
"""
TAIL = """
torch.manual_seed(1)
told = {}
for name, run in CASES.items():
    try:
        run()
        told[name] = ""
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""
# Forward calls that kernels of every dtype must do; a test's program has `dense` and `packed`.
FORWARD_CASES = {
    "one_row": "dense({d}, 1, 1)",
    "ragged": "dense({d}, 200, 333)",
    "whole_blocks": "dense({d}, 256, 256, hq=4, hk=2)",
    "full": "dense({d}, 700, 600, hq=4, hk=2)",
    "causal": "dense({d}, 300, 300, causal=True)",
    "causal_many_heads": "dense({d}, 300, 300, hq=6, hk=3, b=3, causal=True)",
    "causal_more_keys": "dense({d}, 257, 640, causal=True)",
    "rows_without_keys": "dense({d}, 300, 100, causal=True)",
    "window": "dense({d}, 500, 500, window=(100, 30))",
    "chunk": "dense({d}, 256, 512, attention_chunk=150)",
    "softcap": "dense({d}, 200, 300, softcap=10.0, causal=True)",
    "alibi": "dense({d}, 200, 290, slopes=torch.tensor([0.1, 0.4]))",
    "negative_scale": "dense({d}, 200, 300, scale=-0.1)",
    "narrow_v": "dense({d}, 150, 270, dv={d} - 24)",
    "odd_head_dim": "dense({d} - 8, 150, 270)",
    "rising_scores": "dense({d}, 200, 900, rise=60.0)",
    "packed": "packed({d}, (100, 0, 200, 1, 64), (100, 50, 333, 257, 0))",
    "packed_causal": "packed({d}, (130, 5, 256), (130, 300, 256), causal=True)",
    "packed_used": "packed({d}, (130, 5, 256), (130, 300, 256), used_k=(1, 290, 0))",
}


# Kernels of which several CTAs run side by side. Others have shared memory that all would share.
SIDE_BY_SIDE = ("forward", "backward", "dq", "decode")


# Namespaces of kernels that have all of a CTA's shared memory as one array.
NAMESPACES = ("sm80", "sm90", "decode")


def _namespace(unit: codegen.Unit) -> str:
    if unit.kind == "decode":
        return "decode"
    return "sm80" if unit.family == "sm80" else "sm90"


def kernel_source(units: list[codegen.Unit]) -> str:
    """Units in one file, and a table of them by name."""
    params = {unit.symbol: codegen.kind_in(unit.family, unit.kind).params for unit in units}
    most = {unit.symbol: 4 if unit.kind in SIDE_BY_SIDE else 1 for unit in units}
    cases = "".join(
        f'  if (called == "{unit.symbol}") {{\n'
        f"    const auto& params = *static_cast<const flash::{params[unit.symbol]}*>(given);\n"
        f"    emulator::g_smem = flash::{_namespace(unit)}::storage;\n"
        f"    return emulator::run_grid(grid, cluster, threads, {most[unit.symbol]},\n"
        f"                              [&] {{ {unit.symbol}(params); }});\n"
        "  }\n"
        for unit in units
    )
    memory = "".join(
        f"namespace flash::{name} {{\n"
        "__attribute__((aligned(1024))) __shared__ unsigned char storage[emulator::kSmemBytes];\n"
        "}\n"
        for name in NAMESPACES
    )
    return f"""\
#include <string>

#include "emulator.h"
#include "host/flash.h"
{memory}
{"".join(unit.source for unit in units)}
void run_kernel(const char* name, unsigned grid, unsigned cluster, unsigned threads,
                const void* given) {{
  const std::string called = name;
{cases}  emulator::stop("%s is not emulated", name);
}}
"""


def units_for_hopper(head_dims: tuple[int, ...], dtype: str = "bf16") -> list[codegen.Unit]:
    """sm90's and the decode kernels, and what they need."""
    return [
        unit
        for unit in codegen.units()
        if (
            unit.family in FAMILIES and unit.head_dim in head_dims and unit.dtype in (dtype, "e4m3")
        )
        or (unit.family in ("sm90_wide", "sm90_narrow", "sm90_latent") and unit.dtype == dtype)
        or (unit.kind == "decode" and unit.head_dim in DECODE_HEAD_DIMS and unit.dtype == dtype)
        or (
            unit.family == "sm90"
            and unit.kind in ("backward", "convert", "dq")
            and unit.head_dim in BACKWARD_HEAD_DIMS
            and unit.dtype == dtype
        )
        or (unit.kind == "decode" and unit.dtype == "e4m3")
        or (unit.kind in ("combine", "delta", "fill") and unit.dtype == dtype)
    ]


def build_driver(folder: Path, units: list[codegen.Unit], arch: int = 90) -> Path:
    """The stub driver with kernels that have the tiles of an architecture, in `folder`."""
    source = folder / "kernels.cpp"
    source.write_text(kernel_source(units), "utf-8")
    csrc = ROOT / "csrc"
    includes = [f"-I{HERE / 'emulator'}", f"-I{csrc}", f"-I{csrc / 'device'}"]
    options = [
        f"-D__CUDA_ARCH__={arch}0",
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-shared",
        "-fno-extern-tls-init",  # of shared memory
        "-Wno-attributes",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    files = [source, HERE / "stub_driver.cpp", HERE / "emulator" / "emulator.cpp"]
    library = folder / "libcuda.so.1"
    command = [needs("g++"), *options, *includes, *map(str, files), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def build_machine(folder: Path) -> Stub:
    """The package on a driver that runs its kernels."""
    package = folder / "flash_attn"
    ignored = shutil.ignore_patterns("*.so", "kernels", "__pycache__")
    shutil.copytree(ROOT / "flash_attn", package, ignore=ignored)
    for module in ROOT.glob("flash_attn_*.py"):
        shutil.copy(module, folder)
    build_driver(folder, units_for_hopper(HEAD_DIMS))
    lay_out_kernels(package / "kernels", ("80", "90", "90a", "80+ptx"))
    host = native.host(package / native.HOST_LIBRARY, needs("g++"))
    found = native.find_torch()
    native.shim(package / native.shim_name(found), host, found, needs("g++"))
    return Stub(folder)


def run(package: Stub, driver: Stub, log: Path, program: str, **environment: str) -> str:
    """What a program prints that finds the package of one folder and the driver of another."""
    child = driver.run(
        HEAD.format(tests=str(ROOT / "tests")) + program,
        log,
        LD_PRELOAD=str(driver.folder / "libcuda.so.1"),
        PYTHONPATH=str(package.folder),
        OMP_NUM_THREADS="1",
        **environment,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def answers(
    machine: Stub,
    log: Path,
    program: str,
    cases: dict[str, str],
    head_dims: tuple[int, ...] = HEAD_DIMS,
    num_sms: int = 2,
    driver: Optional[Stub] = None,
    arch: int = 90,
) -> tuple[dict[tuple[int, str], str], set[str]]:
    """What each case came to, "" or its error, and the kernels that ran.

    All cases of a head dim share a process. The device has few multiprocessors, so that a CTA has
    several rounds, and little L2 cache, so that heads come in sections. `driver`: one with kernels
    of another architecture.
    """
    device = {"STUB_CC": str(arch), "STUB_SMS": str(num_sms), "STUB_L2": "100000"}
    results = {}
    for d in head_dims:
        rows = "".join(
            f"    {name!r}: lambda: {text.format(d=d)},\n" for name, text in cases.items()
        )
        text = f"{program}\nCASES = {{\n{rows}}}\n{TAIL}"
        told = run(machine, driver or machine, log, text, **device)
        for name, error in json.loads(told.splitlines()[-1]).items():
            results[d, name] = error
    return results, {line.split()[1] for line in lines_of(log, "launch")}
