"""Kernels that run on a CPU: the device code itself, on the emulator of `emulator/`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from native_tools import ROOT, codegen, needs

HERE = Path(__file__).parent
FAMILIES = ("sm90", "sm90_wide", "sm90_scored")


def kernel_source(units: list[codegen.Unit]) -> str:
    """Units in one file, and a table of them by name."""
    params = {unit.symbol: codegen.kind_in(unit.family, unit.kind).params for unit in units}
    cases = "".join(
        f'  if (called == "{unit.symbol}") {{\n'
        f"    const auto& params = *static_cast<const flash::{params[unit.symbol]}*>(given);\n"
        f"    return run_grid(grid, threads, [&] {{ {unit.symbol}(params); }});\n"
        "  }\n"
        for unit in units
    )
    return f"""\
#include <string>

#include "emulator.h"
#include "host/flash.h"
namespace flash::sm90 {{
__attribute__((aligned(1024))) unsigned char storage[emulator::kSmemBytes];
}}
{"".join(unit.source for unit in units)}
static void run_grid(unsigned grid, unsigned threads, const std::function<void()>& kernel) {{
  emulator::g_smem = flash::sm90::storage;
  for (unsigned i = 0; i < grid; ++i) emulator::run_cta(i, grid, threads, kernel);
}}
void run_kernel(const char* name, unsigned grid, unsigned threads, const void* given) {{
  const std::string called = name;
{cases}  emulator::stop("%s is not emulated", name);
}}
"""


def build_driver(folder: Path, head_dims: tuple[int, ...], dtype: str = "bf16") -> Path:
    """The stub driver with sm90's forward kernels, in `folder`."""
    units = [
        unit
        for unit in codegen.units()
        if (unit.family in FAMILIES and unit.head_dim in head_dims and unit.dtype == dtype)
        or (unit.kind == "fill" and unit.dtype == dtype)
    ]
    source = folder / "kernels.cpp"
    source.write_text(kernel_source(units), "utf-8")
    csrc = ROOT / "csrc"
    includes = [f"-I{HERE / 'emulator'}", f"-I{csrc}", f"-I{csrc / 'device'}"]
    options = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-shared",
        "-Wno-attributes",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    files = [source, HERE / "stub_driver.cpp", HERE / "emulator" / "emulator.cpp"]
    library = folder / "libcuda.so.1"
    command = [needs("g++"), *options, *includes, *map(str, files), "-o", str(library)]
    subprocess.run(command, check=True)
    return library
