"""Programs over the torch shim without a GPU: it runs on CPU memory, and a stub driver shows the
launches.

The dispatcher is asked for the CUDA kernels of the operators by hand, so everything but the device
code is what runs on a GPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from native_tools import ROOT, Stub, build_stub, lay_out_kernels, native, needs

PREAMBLE = """
import ctypes, json, torch, flash_attn
from flash_attn.backends import cuda
from flash_attn._problem import *
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
ops = torch.ops.flash_attn
def direct(name, *arguments):
    return getattr(ops, name).default.redispatch(CUDA, *arguments)
def make(*shape, dtype=torch.bfloat16):
    return torch.ones(shape, dtype=dtype)
def forward(q, k, v, p=0.0, scale=0.5, causal=False, left=-1, right=-1, softcap=0.0, slopes=None,
            s_dmask=False):
    return direct("_flash_attn_forward", q, k, v, p, scale, causal, left, right, softcap, slopes,
                  s_dmask)
def told(run):
    try:
        run()
    except (RuntimeError, ValueError) as error:
        return [type(error).__name__, str(error)]
"""


def build_installed(folder: Path) -> Stub:
    """The package as it stands after a build, beside the stub driver."""
    needs("g++")
    stub = build_stub(folder)
    package = stub.folder / "flash_attn"
    ignored = shutil.ignore_patterns("*.so", "kernels", "__pycache__")
    shutil.copytree(ROOT / "flash_attn", package, ignore=ignored)
    for module in ROOT.glob("flash_attn_*.py"):
        shutil.copy(module, stub.folder)
    shutil.copyfile(stub.host, package / stub.host.name)
    lay_out_kernels(package / "kernels")
    found = native.find_torch()
    native.shim(package / native.shim_name(found), package / stub.host.name, found, needs("g++"))
    return stub


def run(stub: Stub, log: Path, text: str, **environment: str) -> Any:
    """The last line that a program prints, read as JSON."""
    environment = {"LD_PRELOAD": str(stub.folder / "libcuda.so.1"), **environment}
    environment = {"PYTHONPATH": str(stub.folder), "OMP_NUM_THREADS": "1", **environment}
    child = stub.run(PREAMBLE + text, log, **environment)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])
