"""What a wheel does once installed: for each torch a fresh environment, a call, the self-tests.

    python benchmarks/environments.py WHEEL --python PYTHON [--python PYTHON ...]

A PYTHON is one of an environment with a torch. pip puts the wheel into a new environment that sees
the packages of that one, but not the flash-attn it may have. Writes
results/<date>-environments-<processor>.json after each; rows of the same wheel with other torches
and Pythons stay as they are, so the environments need not all exist at once. The exit status is 1
if something fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

# Runs in the new environment: what was picked there, and a call against attention in float64.
CALL = """
import json, time
import torch
start = time.monotonic()
import flash_attn
from flash_attn.backends import cuda
q, k, v = torch.randn(3, 2, 300, 4, 64, generator=torch.Generator().manual_seed(0)).unbind()
out = flash_attn.flash_attn_func(q, k, v, causal=True)
seconds = time.monotonic() - start
rows = (x.transpose(1, 2).double() for x in (q, k, v))
exact = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True)
cxx11_abi = torch.compiled_with_cxx11_abi()
print(json.dumps({
    "torch": torch.__version__,
    "cxx11abi": str(cxx11_abi).upper(),
    "shim": cuda.shim_file(torch.__version__, cxx11_abi).name,
    "not_loaded": cuda._WHY_NOT_LOADED,
    "call_seconds": round(seconds, 2),
    "error": (out.transpose(1, 2) - exact).abs().max().item(),
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
}))
"""
NOT_SEEN = re.compile(r"(flash_attn|__editable__|pip|setuptools|_distutils|distutils).*|.*\.pth")


def environment_beside(python: str, folder: Path) -> str:
    """The Python of a new environment that sees the packages of another, but for flash-attn."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    fresh = str(folder / "bin" / "python")
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages, own = (run(x, "-c", asked).strip() for x in (python, fresh))
    seen = folder / "seen"
    seen.mkdir()
    for path in Path(packages).iterdir():
        if not NOT_SEEN.fullmatch(path.name):
            (seen / path.name).symlink_to(path)
    Path(own, "seen.pth").write_text(f"{seen}\n", "utf-8")
    return fresh


def run(python: str, *arguments: str) -> str:
    """What a Python prints; no environment variable leads it to another flash-attn."""
    command = [python, "-E", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: {child.stdout}{child.stderr}")
    return child.stdout


def row(wheel: Path, python: str, folder: Path) -> dict[str, Any]:
    """What the wheel does beside one torch."""
    fresh = environment_beside(python, folder)
    start = time.monotonic()
    run(fresh, "-m", "pip", "install", "--quiet", str(wheel))
    seconds = time.monotonic() - start
    called = json.loads(run(fresh, "-c", CALL).splitlines()[-1])
    report = json.loads(run(fresh, "-m", "flash_attn", "--json"))
    checks = report["self_test"]
    return {
        "python": report["versions"]["python"],
        **called,
        "pip_seconds": round(seconds, 1),
        "passed": sum(check["passed"] for check in checks),
        "checks": len(checks),
    }


def is_good(row: dict[str, Any]) -> bool:
    """Whether the compiled part loads and results are right."""
    return not row["not_loaded"] and row["error"] < 1e-5 and row["passed"] == row["checks"]


def merged(before: dict[str, Any], wheel: Path, row: dict[str, Any]) -> dict[str, Any]:
    """An earlier result with this row; nothing of the earlier one if that was another wheel."""
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    rows = before["rows"] if before.get("sha256") == sha256 else []
    others = [x for x in rows if order(x) != order(row)]
    return {
        "wheel": wheel.name,
        "bytes": wheel.stat().st_size,
        "sha256": sha256,
        "rows": sorted([*others, row], key=order),
    }


def order(row: dict[str, Any]) -> tuple[list[int], str, list[int]]:
    """A row's torch, its local version and the Python: what tells rows apart, as it sorts."""
    release, _, local = row["torch"].partition("+")
    return numbers(release), local, numbers(row["python"])


def numbers(version: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", version)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", action="append", required=True)
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    head, rows = report.of_processor("environments"), []
    path = report.RESULTS / report.file_name(head)
    for python in options.python:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(wheel, python, Path(folder, "venv")))
        print(json.dumps(rows[-1]), file=sys.stderr)
        before = json.loads(path.read_text("utf-8")) if path.exists() else {}
        report.write({**head, **merged(before, wheel, rows[-1])})
    print(path)
    return 0 if all(map(is_good, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
