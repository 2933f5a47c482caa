"""`python -m build_tools slim`: cuts a smaller wheel out of a bigger one.

It has the kernels that some GPUs run and the shims that one torch takes. Where the matrix has such
a wheel too, this is the same one, byte for byte.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

from build_tools import arch, kernel_index, native
from build_tools.assemble import INDEX, SBOM, Contents, assemble, save, split
from build_tools.kernels import serving
from build_tools.matrix import ALL_ARCHS, RELEASE, plain_name
from build_tools.matrix_facts import Facts, load, numbers
from build_tools.sbom import Piece, pieces_of
from build_tools.wheel_name import WheelName
from build_tools.wheel_parts import Wheel
from build_tools.zip_file import DAMAGE, read


class SlimError(ValueError):
    """What a wheel does not have."""


def open_wheel(path: Path) -> tuple[WheelName, Contents]:
    """A wheel of this project's making, taken apart."""
    name = WheelName.parse(path.name)
    try:
        modules, info = split(read(path))
    except DAMAGE as error:
        raise SlimError(f"{path.name} is damaged, fetch or build it again: {error}") from None
    if SBOM not in info or INDEX not in modules:
        raise SlimError(f"{path.name} has no kernels, or was not made by `build`")
    pieces = pieces_of(info[SBOM].data.decode())
    index = kernel_index.parse(modules.pop(INDEX).data.decode())
    compiled = {file: modules.pop(file) for piece in pieces for file in piece.files}
    return name, Contents(modules, info, compiled, pieces, index)


def for_gpus(contents: Contents, asked: Sequence[arch.Arch]) -> Contents:
    """The contents with the kernels alone that GPUs of these architectures run."""
    has: dict[str, list[arch.Arch]] = {}
    for row in contents.index:
        has.setdefault(row.symbol, []).append(row.arch)
    kept = set()
    for gpu in asked:
        images = {serving(gpu, archs) for archs in has.values()} - {None}
        if not images:
            names = ", ".join(map(str, kernel_index.archs(contents.index)))
            raise SlimError(f"none of its kernels runs on {gpu}: they are for {names}")
        kept |= images
    index = [row for row in contents.index if row.arch in kept]
    archs = {None, *(str(image) for image in kept)}
    return _with(contents, lambda piece: piece.made_with.get("arch") in archs, index)


def for_torch(contents: Contents, torch: str) -> Contents:
    """The contents with the shims alone that a minor version of torch takes."""
    files = {f"flash_attn/{native.shim_file(numbers(torch), abi)}" for abi in (True, False)}
    if not files & contents.native.keys():
        pieces = (x.made_with["torch"] for x in contents.pieces if "torch" in x.made_with)
        served = ", ".join(dict.fromkeys(word.removeprefix("torch") for word in pieces))
        raise SlimError(f"it has no shim for torch {torch}; it has those for: {served}")
    kept = [x.name for x in contents.pieces if "torch" not in x.made_with or files & {*x.files}]
    return _with(contents, lambda piece: piece.name in kept, contents.index)


def _with(
    contents: Contents, is_kept: Callable[[Piece], bool], index: list[kernel_index.Row]
) -> Contents:
    pieces = [piece for piece in contents.pieces if is_kept(piece)]
    compiled = {x: contents.native[x] for piece in pieces for x in piece.files}
    return Contents(contents.modules, contents.info, compiled, pieces, index)


def wheel_for(facts: Facts, name: WheelName, contents: Contents, torch: Optional[str]) -> Wheel:
    """The plain wheel of these contents, in an index root that says the rest."""
    archs = tuple(map(str, kernel_index.archs(contents.index)))
    sets = {x.has: x.name for x in facts.archs.values()}
    slim = sets.get(archs, "sm" + "-".join(archs))
    torch = torch or (name.variant.torch if name.variant else None)
    cuda = sorted({x.made_with["cuda"] for x in contents.pieces if "cuda" in x.made_with})
    words = [facts.index, "".join(f"cu{version}" for version in cuda)]
    words += [f"torch{torch}"] * (torch is not None) + [slim] * (slim != ALL_ARCHS)
    return Wheel("/".join(words), plain_name(facts.platform_of(name.platform)), (), torch=torch)


def add_parser(commands: Any) -> None:
    """The subcommand with its options."""
    s = commands.add_parser("slim", help="cut a smaller wheel out of a bigger one")
    s.add_argument("wheel", metavar="WHEEL")
    s.add_argument("--arch", help="GPUs to keep kernels for, e.g. 90 or 80,90 or 80+ptx")
    s.add_argument("--torch", metavar="X.Y", help="the minor version of torch to keep shims for")
    s.add_argument("--to", default="dist", metavar="DIR", help="default: dist")


def run(options: argparse.Namespace) -> int:
    start, path, torch = time.monotonic(), Path(options.wheel), options.torch
    if not options.arch and not torch:
        raise SlimError("say what to keep: --arch, --torch or both")
    if torch and not re.fullmatch(r"\d+\.\d+", torch):
        raise SlimError(f"--torch is {torch!r}; it takes a minor version such as 2.11")
    name, contents = open_wheel(path)
    if name.release != RELEASE:
        raise SlimError(f"{path.name} is release {name.release}; these tools are of {RELEASE}")
    asked = arch.parse_list(options.arch) if options.arch else None
    if asked:
        contents = for_gpus(contents, asked)
    if torch:
        contents = for_torch(contents, torch)
    wheel = wheel_for(load(), name, contents, torch)
    save(assemble(wheel, contents), Path(options.to, wheel.path), start)
    return 0
