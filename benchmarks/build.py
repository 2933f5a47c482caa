"""What building costs on this machine: every kernel for one architecture, host library and shim.

    python benchmarks/build.py [--arch 90]

Compiles into a new folder, so that nothing is taken from an earlier build, with as many compilers
at a time as `python -m build_tools` would run. Writes results/<date>-build-<arch>-<processor>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build_tools import compilers, jobs, kernels, native
from build_tools.parts import Part


def measure(arch: str, folder: Path) -> dict[str, Any]:
    """Builds everything under `folder`: seconds by step, and what each kernel took."""
    seconds = {}
    start = time.monotonic()
    parts = kernels.build(arch, target=folder / "kernels", folder=folder / "parts")
    seconds["kernels"] = time.monotonic() - start
    start = time.monotonic()
    host = native.host(folder / native.HOST_LIBRARY)
    seconds["host library"] = time.monotonic() - start
    start = time.monotonic()
    torch = native.find_torch()
    native.shim(folder / native.shim_name(torch), host, torch)
    seconds["shim"] = time.monotonic() - start
    return {"seconds": {step: round(x, 1) for step, x in seconds.items()}, "rows": rows_of(parts)}


def rows_of(parts: list[Part]) -> list[dict[str, Any]]:
    """A row for each image."""
    return [
        {
            "kernel": part.unit.symbol,
            "kind": part.unit.kind,
            "head_dim": part.unit.head_dim,
            "dtype": part.unit.dtype,
            **vars(part.facts()),
        }
        for part in parts
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="90", help="one architecture, e.g. 80")
    arch = parser.parse_args().arch
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        made = measure(arch, Path(folder))
    result = {
        "jobs": jobs.choose(None, ()),
        "arch": arch,
        "compiler": " ".join(compilers.make("nvrtc", None).identity.split()[:2]),
    }
    path = report.write({**report.of_processor("build"), **result, **made})
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
