"""Compiles one part in a process of its own: `python -m build_tools.compile_part JOB.json`.

ninja runs many of these. A source that the compiler refuses leaves STEM.error; a process that was
killed leaves nothing, and that is how the two are told apart.
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


def peak_mb() -> int:
    """Peak memory of this process or of its largest child, whichever was more."""
    if resource is None:
        return 0
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(x).ru_maxrss for x in who) // 1024


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text("utf-8"))
    compiler = compilers.make(job["compiler"], job["path"])
    unit = next(unit for unit in units() if unit.symbol == job["symbol"])
    part = make_part(unit, Arch.parse(job["arch"]), compiler.identity, Path(job["folder"]))
    if part.stem != job["stem"]:
        (part.folder / f"{job['stem']}.error").write_text("sources changed while building", "utf-8")
        return 1
    start = time.monotonic()
    try:
        code, log = compiler.compile(part.unit.source, part.arch)
    except compilers.CompileError as error:
        part.error.write_text(str(error), "utf-8")
        return 1
    part.store(code, facts_of_log(log, time.monotonic() - start, peak_mb(), code))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
