"""`python -m build_tools mirror | verify`: a folder of wheels as an index that only grows.

Files that never change (wheels, their METADATA and bills of materials) are put in place before the
manifest and the pages that name them, each under another name first. So whatever cuts a run off,
the pages lead to whole files; the next run takes in what this one left.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Optional

from build_tools import download, index_pages, manifest
from build_tools.choose_wheel import Wanted
from build_tools.index_pages import SUMS
from build_tools.manifest import INDEX, Contents, Entry, ManifestError
from build_tools.wheel_name import PROJECT, has_build_number

PART = ".part"


def add_parsers(commands: Any) -> None:
    """The subcommands with their options."""
    m = commands.add_parser("mirror", help="make a folder of wheels an index, or copy a mirror")
    m.add_argument("--to", required=True, type=Path, metavar="DIR", help="the mirror")
    m.add_argument(
        "--from",
        default="dist",
        dest="source",
        metavar="DIR|URL",
        help="wheels in a folder, or another mirror; default: dist",
    )
    for axis, example in (("platform", "linux_x86_64"), ("cuda", "12"), ("python", "3.12"),
                          ("torch", "2.8")):  # fmt: skip
        m.add_argument(
            f"--{axis}",
            action="append",
            default=[],
            metavar=example,
            help="only wheels that serve it; may be repeated",
        )
    v = commands.add_parser("verify", help="compare every file of a mirror with its hash")
    v.add_argument("folder", type=Path, metavar="DIR")


def run(options: argparse.Namespace) -> int:
    wanted = Wanted(
        tuple(options.platform), tuple(options.cuda), tuple(options.python), tuple(options.torch)
    )
    added, total = mirror(options.source, options.to, wanted)
    print(f"{options.to}: {added} wheels added, {total} in all")
    return 0


def mirror(source: str, to: Path, wanted: Optional[Wanted] = None) -> tuple[int, int]:
    """Adds wheels to a mirror; returns how many were added, and how many it has.

    Raises:
        ManifestError: a wheel is not in order, or the mirror has another one under its name.
        DownloadError: a wheel of another mirror cannot be had.
    """
    wanted = wanted or Wanted()
    to.mkdir(parents=True, exist_ok=True)
    listed = read_manifest(to)
    damaged = {entry.path for entry in listed.values() if not mend(to, entry)}
    entries = {**listed, **{entry.path: entry for entry in left_over(to, listed)}}
    before, found = len(listed), 0
    if not (is_mirror := bool(download.scheme(source))):
        source = str(Path(source).absolute())
        is_mirror = Path(source, manifest.FILE).exists()
    offered = from_mirror if is_mirror else from_folder
    try:
        for entry in offered(source, to, wanted, entries, damaged):
            if entry.path in damaged:
                print(f"missing or damaged, put in place anew: {entry.path}", file=sys.stderr)
                damaged.remove(entry.path)
            entries[entry.path] = entry
            found += 1
    finally:
        for path in sorted(damaged):
            print(f"missing or damaged, and left so: {path}", file=sys.stderr)
        # What was finished before a failure is in order, and is shown.
        if entries:
            publish(to, entries)
    if not found:
        raise ManifestError(f"{download.shown(source)} has no wheel of {PROJECT} that fits{wanted}")
    return len(entries) - before, len(entries)


def read_manifest(folder: Path) -> dict[str, Entry]:
    file = folder / manifest.FILE
    return manifest.parse(file.read_bytes()) if file.exists() else {}


def mend(to: Path, entry: Entry) -> bool:
    """Puts right what stands beside a wheel; False if the wheel itself is missing or damaged."""
    file = to / entry.path
    if not file.exists() or manifest.sha256(file) != entry.sha256:
        return False
    write_beside(to, manifest.read_wheel(file, entry.name, entry.path))
    return True


def left_over(to: Path, listed: dict[str, Entry]) -> Iterator[Entry]:
    """Wheels in a mirror that its manifest lacks: of a run that was cut off."""
    for file in sorted((to / INDEX).rglob("*.whl")):
        path = file.relative_to(to).as_posix()
        if path not in listed:
            contents = manifest.read_wheel(file, file.name, path)
            write_beside(to, contents)
            yield contents.entry


def from_folder(
    source: str, to: Path, wanted: Wanted, has: dict[str, Entry], damaged: set[str]
) -> Iterator[Entry]:
    """Puts wheels of a folder into a mirror."""
    folder = Path(source)
    if not folder.is_dir():
        raise ManifestError(f"{folder} is no folder")
    for file in sorted(folder.rglob("*.whl")):
        if not file.name.startswith("flash_attn-"):
            print(f"not a wheel of {PROJECT}, left out: {file.name}", file=sys.stderr)
            continue
        if has_build_number(file.name):
            print(
                f"compiled for one machine, as its build number says, and left out: {file.name}; "
                "mirrors hold the wheels of `python -m build_tools build`",
                file=sys.stderr,
            )
            continue
        contents = manifest.read_wheel(file, file.name, _place(file.relative_to(folder)))
        if not wanted.takes(contents.entry):
            continue
        if lacks(to, contents.entry, has, damaged):
            target = to / contents.entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}{PART}")
            shutil.copyfile(file, part)
            if manifest.sha256(part) != contents.entry.sha256:
                part.unlink()
                raise ManifestError(f"{file} changed while it was read; try again")
            write_beside(to, contents)
            part.replace(target)
        yield contents.entry


def _place(path: Path) -> Optional[str]:
    """Where a file stands below an index root such as whl/cu12; None if it does not."""
    parts = path.parts
    if len(parts) < 3 or parts[-2] != PROJECT or INDEX not in parts:
        return None
    return PurePosixPath(*parts[parts.index(INDEX) :]).as_posix()


def from_mirror(
    source: str, to: Path, wanted: Wanted, has: dict[str, Entry], damaged: set[str]
) -> Iterator[Entry]:
    """Downloads wheels of another mirror."""
    base = download.address(source.removesuffix(manifest.FILE))
    offered = manifest.parse(download.read(download.join(base, manifest.FILE)))
    for entry in offered.values():
        if not wanted.takes(entry):
            continue
        if lacks(to, entry, has, damaged):
            target = to / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            url = download.join(base, entry.path)
            download.fetch(url, target, entry.size, entry.sha256)
            contents = _contents_of(target, entry)
            write_beside(to, contents)
        yield entry


def _contents_of(file: Path, entry: Entry) -> Contents:
    """A downloaded wheel's own words, which the other mirror's must agree with."""
    try:
        contents = manifest.read_wheel(file, file.name, entry.path)
        if contents.entry != entry:
            raise ManifestError(f"{entry.path} is not what the other mirror's {manifest.FILE} says")
    except ManifestError:
        file.unlink()
        raise
    return contents


def lacks(to: Path, entry: Entry, has: dict[str, Entry], damaged: set[str]) -> bool:
    """Whether a mirror lacks a wheel; ManifestError if it has another one in its place."""
    old = has.get(entry.path)
    if old is not None and old.sha256 != entry.sha256:
        raise ManifestError(
            f"{to / entry.path} is there with sha256 {old.sha256}, and one with {entry.sha256} "
            "is to take its place; a mirror only grows: give the new wheel another version"
        )
    return old is None or entry.path in damaged


def write_beside(to: Path, contents: Contents) -> None:
    """A wheel's METADATA and bills of materials as files of their own."""
    folder = (to / contents.entry.path).parent
    for name, data in contents.files().items():
        write(folder / name, data)


def publish(to: Path, entries: dict[str, Entry]) -> None:
    """The manifest, the hashes and the pages."""
    for path, text in expected(to, entries).items():
        write(to / path, text.encode())


def expected(to: Path, entries: dict[str, Entry]) -> dict[str, str]:
    """Every file that is made of the manifest, by its path."""
    beside = {f"{entry.path}.metadata": entry.metadata_sha256 for entry in entries.values()}
    for entry in entries.values():
        folder = PurePosixPath(entry.path).parent
        for name in entry.sboms:
            with suppress(FileNotFoundError):
                beside[f"{folder}/{name}"] = manifest.sha256(to / folder / name)
    return {
        manifest.FILE: manifest.text(entries.values()),
        SUMS: index_pages.sums(entries.values(), beside),
        **index_pages.pages(entries.values()),
    }


def write(file: Path, data: bytes) -> None:
    """Puts a file in place as a whole; one that is as it should be is left alone."""
    if file.exists() and file.read_bytes() == data:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}{PART}")
    try:
        part.write_bytes(data)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def run_verify(options: argparse.Namespace) -> int:
    folder = options.folder
    if not (folder / manifest.FILE).exists():
        raise ManifestError(f"{folder} is no mirror: it has no {manifest.FILE}")
    entries = read_manifest(folder)
    wrong = list(problems(folder, entries))
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(f"{folder}: {len(wrong)} files are not in order", file=sys.stderr)
        return 1
    print(f"{folder}: {len(entries)} wheels, all in order")
    return 0


def problems(folder: Path, entries: dict[str, Entry]) -> Iterator[str]:
    """What is wrong with a mirror, a line for each file."""
    known = set()
    for entry in entries.values():
        known.add(entry.path)
        beside = PurePosixPath(entry.path).parent
        known |= {f"{beside}/{name}" for name in (f"{entry.name}.metadata", *entry.sboms)}
        yield from _problems_of_wheel(folder, entry)
    for path, text in expected(folder, entries).items():
        known.add(path)
        file = folder / path
        if not file.exists():
            yield f"{path} is missing; `mirror` writes it"
        elif file.read_bytes() != text.encode():
            yield f"{path} is not what follows from {manifest.FILE}; `mirror` writes it anew"
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if file.is_file() and path not in known:
            yield f"{path} is not known to {manifest.FILE}"


def _problems_of_wheel(folder: Path, entry: Entry) -> Iterator[str]:
    file = folder / entry.path
    if not file.exists():
        yield f"{entry.path} is missing"
        return
    found = manifest.sha256(file)
    if found != entry.sha256:
        yield f"{entry.path} has sha256 {found}, and {entry.sha256} in {manifest.FILE}"
        return
    contents = manifest.read_wheel(file, entry.name, entry.path)
    if contents.entry != entry:
        yield f"{entry.path} is not what {manifest.FILE} says of it"
    for name, data in contents.files().items():
        beside = file.with_name(name)
        path = beside.relative_to(folder).as_posix()
        if not beside.exists():
            yield f"{path} is missing"
        elif beside.read_bytes() != data:
            yield f"{path} is not what is in the wheel"
