"""`python -m build_tools kernels`: compiles every unit of the table and lays the kernels out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Optional

from build_tools import compilers, jobs, ninja
from build_tools.arch import Arch, wanted
from build_tools.codegen import Unit, units
from build_tools.parts import Part, make_part
from build_tools.paths import BUILD, KERNELS

PARTS = BUILD / "parts"
HEADER = "flash-attn-kernels 1"


def plan(
    compiler: compilers.Compiler,
    archs: Optional[list[Arch]],
    only: Optional[str] = None,
    folder: Path = PARTS,
) -> list[Part]:
    """The parts of a build: what the table has of what is asked for.

    Raises:
        BuildError: the compiler does not know an architecture that was asked for by name.
    """
    chosen = [unit for unit in units() if only is None or only in unit.symbol]
    images = [(unit, arch) for unit in chosen for arch in archs_of(unit, archs)]
    unknown = {arch for _, arch in images if not compiler.supports(arch)}
    if unknown and archs is not None:
        names = ", ".join(arch.flag for arch in sorted(unknown))
        raise ninja.BuildError(
            f"{compiler.identity} does not know {names}; "
            f"a newer one does: {compilers.TO_INSTALL} --upgrade"
        )
    return [
        make_part(unit, arch, compiler.identity, folder)
        for unit, arch in images
        if arch not in unknown
    ]


def archs_of(unit: Unit, asked: Optional[list[Arch]]) -> list[Arch]:
    """Architectures of a unit that serve those asked for; None asks for all."""
    has = [Arch.parse(text) for text in unit.archs]
    if asked is None:
        return has
    chosen = {serving(arch, has) for arch in asked}
    return [arch for arch in has if arch in chosen]


def serving(asked: Arch, has: list[Arch]) -> Optional[Arch]:
    """What a device of `asked` runs best among `has`, by the rules of csrc/host/registry.cpp.

    Code for its own architecture, else for an earlier one of its generation, else PTX.
    """
    if asked in has:
        return asked
    code = [] if asked.is_ptx else [arch for arch in has if _runs_code(asked, arch)]
    ptx = [arch for arch in has if arch.is_ptx and arch.number <= asked.number]
    return max(code or ptx, default=None)


def is_served(device: Arch) -> bool:
    """Whether the table has kernels that run on a device."""
    return any(archs_of(unit, [device]) for unit in units())


def _runs_code(device: Arch, code: Arch) -> bool:
    if code.is_ptx or code.suffix:
        return not code.is_ptx and code.number == device.number
    return code.number // 10 == device.number // 10 and code.number <= device.number


def index_text(parts: Iterable[Part], files: dict[Part, str]) -> str:
    """The table that csrc/host/registry.h describes."""
    rows = [HEADER]
    for part in parts:
        unit, arch = part.unit, part.arch
        words = (unit.kind, unit.family, unit.head_dim, unit.dtype, f"{arch.number}{arch.suffix}")
        rows.append(" ".join(map(str, (*words, arch.form, unit.symbol, files[part]))))
    return "\n".join(rows) + "\n"


def install(parts: list[Part], folder: Path) -> None:
    """Copies parts into a folder with their table, in place of what was there."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    files = {}
    for part in parts:
        files[part] = f"{part.arch.flag}/{part.unit.symbol}.{part.arch.form}"
        target = fresh / files[part]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part.code, target)
    (fresh / "index.txt").write_text(index_text(parts, files), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def report(parts: list[Part]) -> str:
    """A line for each part: registers, spills, stack, seconds, memory, bytes."""
    head = ("kernel", "arch", "registers", "spill bytes", "stack", "seconds", "peak MB", "KB")
    rows = [head, tuple("---" for _ in head)]
    for part in parts:
        f = part.facts()
        cells = (f.registers, f.spill_stores + f.spill_loads, f.stack, f.seconds, f.peak_mb)
        rows.append(
            (part.unit.symbol, str(part.arch), *map(str, cells), f"{f.code_bytes / 1024:.0f}")
        )
    facts = [part.facts() for part in parts]
    total = (
        f"{len(parts)} images, {sum(f.seconds for f in facts):.0f} compiler seconds, peak "
        f"{max((f.peak_mb for f in facts), default=0)} MB, "
        f"{sum(f.code_bytes for f in facts) / 1e6:.1f} MB"
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{total}\n"


def warnings(parts: list[Part]) -> Iterator[str]:
    """What makes a kernel slow: nothing but what test_machine_code.py lists may."""
    for part in parts:
        facts = part.facts()
        if part.unit.kind == "forward" and facts.spill_stores:
            yield f"warning: {part.unit.symbol} {part.arch} spills registers"
        if facts.remark:
            yield f"warning: {part.unit.symbol} {part.arch}: ptxas says {facts.remark}"


def build(
    arch: Optional[str] = None,
    compiler: str = "nvrtc",
    path: Optional[str] = None,
    num_jobs: Optional[int] = None,
    only: Optional[str] = None,
    target: Path = KERNELS,
    folder: Path = PARTS,
) -> list[Part]:
    """Builds in `folder`, where finished parts stay, and installs; returns the parts."""
    start = time.monotonic()
    made = compilers.make(compiler, path)
    archs = wanted(arch)
    unserved = ", ".join(str(x) for x in archs or [] if not is_served(x))
    if unserved:
        print(f"no kernel of the table runs on {unserved}", flush=True)
    parts = plan(made, archs, only, folder)
    if not parts:
        names = ", ".join(map(str, archs)) if archs else "any architecture"
        named = f" with {only} in its name" if only else ""
        raise ninja.BuildError(f"there is no kernel{named} to build for {names}")
    folder.mkdir(parents=True, exist_ok=True)
    count = jobs.choose(num_jobs, (p.facts().peak_mb for p in parts if p.is_built))
    missing = sum(not part.is_built for part in parts)
    print(
        f"{made.identity}: {len(parts)} images, {missing} to compile, {count} at a time", flush=True
    )
    ninja.build(parts, compiler, str(made.path), folder, count)
    install(parts, target)
    print(f"{target}: {len(parts)} images in {time.monotonic() - start:.0f} s", flush=True)
    return parts
