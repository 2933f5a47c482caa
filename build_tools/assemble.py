"""`python -m build_tools build`: makes parts and puts wheels together from them.

What a wheel has besides its parts comes out of the build that `pip install` runs, without kernels:
there is no second list of modules. The same parts give the same bytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from build_tools import kernel_index, make_parts, native, sbom
from build_tools.make_parts import Made
from build_tools.matrix import Matrix, MatrixError
from build_tools.ninja import BuildError
from build_tools.paths import KERNELS, PACKAGE, ROOT, env
from build_tools.sbom import Piece
from build_tools.wheel_name import DISTRIBUTION
from build_tools.wheel_parts import Wheel, parts_of
from build_tools.zip_file import Entries, Entry, read, wheel_order, write

GENERATOR = "flash-attn build_tools"
INDEX = f"{PACKAGE.name}/{KERNELS.name}/{kernel_index.FILE}"
SBOM = f"sboms/{sbom.FILE}"
# Written anew for each wheel.
GENERATED = ("WHEEL", "RECORD", SBOM)

# --global-option names what stands before "bdist_wheel" on setup.py's command line.
_PURE = """
import sys
from build_tools import backend
out, base = sys.argv[1:]
words = ["--quiet", "egg_info", f"--egg-base={base}", "build", f"--build-base={base}"]
backend.build_wheel(out, {"--global-option": words})
"""


@dataclass(frozen=True)
class Contents:
    """What goes into a wheel, before its name is known.

    Args:
        modules: the package, and the modules beside it.
        info: files of dist-info, by their names below it.
        native: what is compiled, but for the table of kernels.
        pieces: the parts that `native` is of.
        index: the table of kernels.
    """

    modules: Entries
    info: Entries
    native: Entries
    pieces: list[Piece]
    index: list[kernel_index.Row]


@cache
def pure_package() -> tuple[Entries, Entries]:
    """(modules, dist-info) of the wheel that setuptools makes of these sources without kernels."""
    others = [name for v in env.BUILD_VARIABLES for name in (v.name, *v.aliases)]
    # env(1) sets what only this child is to see.
    command = ["env", *(word for name in others for word in ("-u", name))]
    command += [f"{env.FLASH_ATTENTION_SKIP_CUDA_BUILD.name}=TRUE", sys.executable, "-c", _PURE]
    with tempfile.TemporaryDirectory() as scratch:
        out, base = Path(scratch, "out"), Path(scratch, "base")
        out.mkdir()
        base.mkdir()
        command += [str(out), str(base)]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        wheels = list(out.glob("*.whl"))
        if child.returncode or len(wheels) != 1:
            raise BuildError(f"the package cannot be built:\n{child.stdout}{child.stderr}")
        return split(read(wheels[0]))


def split(entries: Entries) -> tuple[Entries, Entries]:
    """(modules, dist-info) of a wheel; dist-info by names below it."""
    modules, info = {}, {}
    for name, entry in entries.items():
        folder, _, below = name.partition("/")
        if folder.startswith(f"{DISTRIBUTION}-") and folder.endswith(".dist-info"):
            info[below] = entry
        else:
            modules[name] = entry
    return modules, info


def contents_of(pure: tuple[Entries, Entries], parts: Iterable[Made]) -> Contents:
    """The package with parts."""
    native, pieces, tables = {}, [], []
    for made in parts:
        files = []
        for name in made.piece.files:
            if name == INDEX:
                tables.append(kernel_index.parse(made.file(name).read_text("utf-8")))
            else:
                native[name] = _entry(made.file(name))
                files.append(name)
        pieces.append(Piece(made.piece.name, made.piece.made_with, tuple(files)))
    return Contents(*pure, native, pieces, kernel_index.merged(tables))


_entries: dict[Path, Entry] = {}


def _entry(path: Path) -> Entry:
    """A file of a part, read and compressed once for all wheels."""
    if path not in _entries:
        _entries[path] = Entry(path.read_bytes(), path.suffix == ".so")
    return _entries[path]


def assemble(wheel: Wheel, contents: Contents) -> bytes:
    """The bytes of a wheel."""
    folder = f"{DISTRIBUTION}-{wheel.name.version}.dist-info"
    metadata = wheel.stamp(contents.info["METADATA"].data.decode())
    index = kernel_index.render(contents.index)
    info = {name: entry for name, entry in contents.info.items() if name not in GENERATED}
    info["METADATA"] = _text(metadata)
    info["WHEEL"] = _text(
        f"Wheel-Version: 1.0\nGenerator: {GENERATOR} ({wheel.name.release})\n"
        f"Root-Is-Purelib: false\nTag: {wheel.name.tag}\n\n"
    )
    info[SBOM] = _text(sbom.text(metadata, contents.pieces, contents.native))
    entries = {**contents.modules, **contents.native, INDEX: _text(index)}
    entries.update({f"{folder}/{name}": entry for name, entry in info.items()})
    record = f"{folder}/RECORD"
    lines = [f"{_quoted(name)},{entries[name].record}" for name in wheel_order(entries)]
    entries[record] = _text("\n".join([*lines, f"{record},,"]) + "\n")
    return write(entries, wheel_order(entries))


def _text(text: str) -> Entry:
    return Entry(text.encode())


def _quoted(name: str) -> str:
    """A name in RECORD, which is CSV."""
    return '"' + name.replace('"', '""') + '"' if "," in name or '"' in name else name


def add_parsers(commands: Any) -> None:
    """The subcommands with their options."""
    b = commands.add_parser("build", help="put wheels of the matrix together")
    b.add_argument(
        "--only",
        action="append",
        required=True,
        metavar="GLOB",
        help="wheels whose path or file name fits, e.g. 'whl/flash-attn/*x86_64.whl'; may be "
        "repeated",
    )
    b.add_argument("--to", default="dist", metavar="DIR", help="default: dist")
    p = commands.add_parser("part", help="make parts of wheels")
    p.add_argument("names", nargs="+", metavar="NAME", help="as `matrix --format json` names them")
    for command in (b, p):
        add_parts_option(command)


def add_parts_option(command: argparse.ArgumentParser) -> None:
    """The option that says where parts stand."""
    default = make_parts.STORE
    command.add_argument(
        "--parts",
        type=Path,
        default=default,
        metavar="DIR",
        help=f"where parts stand, each in a folder; default: {default.relative_to(ROOT)}",
    )


def run_build(options: argparse.Namespace) -> int:
    to = Path(options.to)
    build(Matrix().wheels(options.only), options.parts, lambda wheel: to / wheel.path)
    return 0


def build(wheels: Iterable[Wheel], store: Path, place: Callable[[Wheel], Path]) -> None:
    """Puts wheels together, after making the parts that a store lacks."""
    wheels = list(wheels)
    made = make_parts.make_all(parts_of(wheels), store)
    pure = pure_package()
    for wheel in wheels:
        start = time.monotonic()
        data = assemble(wheel, contents_of(pure, (made[part] for part in wheel.parts)))
        save(data, place(wheel), start)


def universal(folder: Path, store: Path) -> str:
    """Puts the wheel for every torch of this platform into a folder; its file name."""
    matrix, here = Matrix(), make_parts.platform_of_compiler()
    if here not in matrix.facts.platform:
        known = ", ".join(matrix.facts.platform)
        cxx = " ".join(native.compiler())
        raise BuildError(f"{cxx} compiles for {here}; there are wheels for {known}")
    wheel = matrix.universal(matrix.facts.platform[here])
    build([wheel], store, lambda wheel: folder / str(wheel.name))
    return str(wheel.name)


def save(data: bytes, path: Path, start: float) -> None:
    """Writes a wheel, and a line that says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_bytes(data)
    half.replace(path)
    print(f"{path}: {len(data) / 1e6:.1f} MB in {time.monotonic() - start:.1f} s", flush=True)


def run_part(options: argparse.Namespace) -> int:
    parts = {part.name: part for part in parts_of(Matrix().wheels())}
    unknown = [name for name in options.names if name not in parts]
    if unknown:
        raise MatrixError(f"there is no part {unknown[0]}; there is {', '.join(parts)}")
    asked = [parts[name] for name in options.names]
    for made in make_parts.make_all(asked, options.parts).values():
        print(made.folder)
    return 0
