"""Compiles one part in a process of its own: `python -m build_tools.compile_part JOB.json`.

ninja runs many of these. What keeps a part from being made stands in STEM.error; one that was
killed, or found too little memory, ends with the status of a killed process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from build_tools import compilers
from build_tools.arch import Arch
from build_tools.codegen import units
from build_tools.parts import facts_of_log, make_part

try:
    import resource
except ImportError:  # Windows has no such module, and the report then no memory column
    resource = None  # type: ignore[assignment]

# Exit statuses: what went wrong stands in STEM.error; and what a shell says of a killed process.
TOLD, KILLED = 3, 137


def peak_mb() -> int:
    """Peak memory of this process or of its largest child, whichever was more."""
    if resource is None:
        return 0
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(x).ru_maxrss for x in who) // 1024


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text("utf-8"))
    try:
        _make(job)
    except MemoryError:
        return KILLED
    except Exception as error:
        is_ours = isinstance(error, RuntimeError)
        told = str(error) if is_ours else f"{type(error).__name__}: {error}"
        file = Path(job["folder"], f"{job['stem']}.error")
        try:
            file.write_text(told, "utf-8")
        except OSError:  # a full disk has no room for it either
            print(f"{job['stem']}: {told}", file=sys.stderr)
            return 1
        return TOLD
    return 0


def _make(job: dict[str, str]) -> None:
    compiler = compilers.make(job["compiler"], job["path"])
    unit = next(unit for unit in units() if unit.symbol == job["symbol"])
    part = make_part(unit, Arch.parse(job["arch"]), compiler.identity, Path(job["folder"]))
    if part.stem != job["stem"]:
        raise RuntimeError("sources changed while building")
    start = time.monotonic()
    code, log = compiler.compile(part.unit.source, part.arch)
    part.store(code, facts_of_log(log, time.monotonic() - start, peak_mb(), code))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
