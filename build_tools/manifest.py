"""`wheels.json`: which wheels a mirror has, what each is for, and its hash.

An installation from source reads it, so: standard library only, every supported Python.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from email.parser import BytesHeaderParser
from pathlib import Path, PurePosixPath
from typing import Any, Optional

from build_tools import kernel_index
from build_tools.arch import Arch
from build_tools.wheel_name import PROJECT, WheelName
from build_tools.zip_file import DAMAGE

FILE, SCHEMA = "wheels.json", 1
INDEX = "whl"
# What a wheel serves that names neither; tests/build_tools/test_mirror.py compares with the matrix.
EVERY_CUDA, OLDEST_TORCH = ("12", "13"), "2.4"

_PATH = re.compile(rf"{INDEX}(?:/[a-z0-9][a-z0-9.]*)*/{PROJECT}/[^/]+")
_CUDA_FOLDER = re.compile(r"cu(\d+)")
_PIN = re.compile(r"torch\s*\(?==\s*(\d+\.\d+)\.\*\)?")


class ManifestError(ValueError):
    """A manifest, or a wheel that cannot stand in one."""


@dataclass(frozen=True)
class Entry:
    """A wheel.

    Args:
        path: where it stands, relative to the manifest.
        tags: Python, ABI and platform, as its file WHEEL lists them.
        torch: the minor version that it is for; None for every one from `OLDEST_TORCH` on.
        cuda: the major versions that it is for; none if it has no kernels.
        archs: what its kernels are compiled for.
        metadata_sha256: of its METADATA, which stands beside it.
        requires_python: as in METADATA.
        sboms: files with its bill of materials, beside it.
    """

    path: str
    version: str
    size: int
    sha256: str
    tags: tuple[str, ...]
    torch: Optional[str]
    cuda: tuple[str, ...]
    archs: tuple[str, ...]
    metadata_sha256: str
    requires_python: str
    sboms: tuple[str, ...]

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def root(self) -> str:
        """The index that it stands in."""
        return PurePosixPath(self.path).parents[1].as_posix()

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> Entry:
        """An entry from JSON; ManifestError for one that lacks something or leads elsewhere."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = row.get(field.name)
            kind = "list" if "tuple" in str(field.type) else str(field.type)
            if not _fits(value, kind):
                raise ManifestError(f"{FILE}: {row.get('path')!r} has {field.name} = {value!r}")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        entry = cls(**values)
        is_hash = re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        if not is_hash or not _PATH.fullmatch(entry.path):
            raise ManifestError(f"{FILE}: {entry.path!r} with hash {entry.sha256!r} is not valid")
        try:
            WheelName.parse(entry.name)
            for arch in entry.archs:
                Arch.parse(arch)
        except ValueError as error:
            raise ManifestError(f"{FILE}: {entry.path!r}: {error}") from None
        if not re.fullmatch(r"\d+\.\d+", entry.torch or OLDEST_TORCH):
            raise ManifestError(f"{FILE}: {entry.path!r} is for torch {entry.torch!r}, no version")
        return entry


def _fits(value: object, kind: str) -> bool:
    if kind == "list":
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    if kind == "int":
        return isinstance(value, int) and value > 0
    return isinstance(value, str) or (value is None and kind.startswith("Optional"))


def parse(text: bytes) -> dict[str, Entry]:
    """The entries of a manifest by path."""
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{FILE} is no JSON: {error}") from None
    if not isinstance(read, dict) or read.get("schema") != SCHEMA:
        raise ManifestError(f"{FILE} must say 'schema': {SCHEMA}; a later release may read it")
    rows = read.get("wheels")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ManifestError(f"{FILE} has no list of wheels")
    return {entry.path: entry for entry in map(Entry.parse, rows)}


def text(entries: Iterable[Entry]) -> str:
    """The manifest of entries; their order does not matter."""
    rows = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.path)]
    head = {"schema": SCHEMA, "project": PROJECT, "wheels": rows}
    return json.dumps(head, indent=1) + "\n"


@dataclass(frozen=True)
class Contents:
    """A wheel with what a mirror shows beside it: file names with their bytes."""

    entry: Entry
    metadata: bytes
    sboms: Mapping[str, bytes]

    def files(self) -> dict[str, bytes]:
        """What stands beside the wheel."""
        return {f"{self.entry.name}.metadata": self.metadata, **self.sboms}


def read_wheel(file: Path, name: str, path: Optional[str] = None) -> Contents:
    """What a wheel says of itself.

    Args:
        name: its file name, which `file` need not bear yet.
        path: where it stands in an index; None derives that from its contents.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            files = {
                entry: archive.read(entry)
                for entry in archive.namelist()
                if re.fullmatch(r"[^/]+\.dist-info/(METADATA|WHEEL|sboms/[^/]+)", entry)
                or entry == "flash_attn/kernels/index.txt"
            }
    except (OSError, *DAMAGE) as error:
        raise ManifestError(f"{name} cannot be read as a wheel: {error}") from None
    parsed = WheelName.parse(name)
    info = f"flash_attn-{parsed.version}.dist-info"
    if not {f"{info}/METADATA", f"{info}/WHEEL"} <= files.keys():
        raise ManifestError(f"{name} has no {info}/METADATA and WHEEL")
    metadata = files[f"{info}/METADATA"]
    head = BytesHeaderParser().parsebytes(metadata)
    if (head["Name"], head["Version"]) != (PROJECT, parsed.version):
        raise ManifestError(
            f"{name} has METADATA of {head['Name']} {head['Version']}; the two must agree, or pip "
            "takes it from no index"
        )
    pins = [pin[1] for x in head.get_all("Requires-Dist", []) if (pin := _PIN.fullmatch(x.strip()))]
    torch = pins[0] if pins else None
    archs = _archs(files.get("flash_attn/kernels/index.txt", b"").decode())
    place = path or _derived_path(parsed, torch, is_compiled=bool(archs))
    tags = BytesHeaderParser().parsebytes(files[f"{info}/WHEEL"]).get_all("Tag", [])
    sboms = {
        f"{name}.{entry.rpartition('/')[2]}": data
        for entry, data in files.items()
        if entry.startswith(f"{info}/sboms/")
    }
    entry = Entry(
        path=place,
        version=parsed.version,
        size=file.stat().st_size,
        sha256=sha256(file),
        tags=tuple(tags),
        torch=torch,
        cuda=_cuda(place, torch) if archs else (),
        archs=archs,
        metadata_sha256=hashlib.sha256(metadata).hexdigest(),
        requires_python=str(head["Requires-Python"] or ""),
        sboms=tuple(sorted(sboms)),
    )
    if not _PATH.fullmatch(place):
        raise ManifestError(f"{place} must stand in a folder such as {INDEX}/cu12/{PROJECT}")
    return Contents(entry, metadata, sboms)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for block in iter(lambda: opened.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _archs(index: str) -> tuple[str, ...]:
    """Architectures in a table of kernels; none where there is no table."""
    return tuple(map(str, kernel_index.archs(kernel_index.parse(index)))) if index else ()


def _cuda(path: str, torch: Optional[str]) -> tuple[str, ...]:
    parts = PurePosixPath(path).parts
    named = tuple(found[1] for part in parts if (found := _CUDA_FOLDER.fullmatch(part)))
    if not named and torch is not None:
        raise ManifestError(
            f"{path} asks for torch {torch} in an index of every torch; it must stand in a folder "
            f"such as {INDEX}/cu12/torch{torch}/{PROJECT}"
        )
    return named or EVERY_CUDA


def _derived_path(name: WheelName, torch: Optional[str], is_compiled: bool) -> str:
    """Where a wheel of a flat folder belongs, as docs/matrix.md has it."""
    if name.variant is not None:
        return f"{INDEX}/cu{name.variant.cuda}/{PROJECT}/{name}"
    if torch is not None and is_compiled:
        raise ManifestError(
            f"{name} asks for torch {torch}, and its name does not tell the CUDA version: it must "
            f"stand in a folder such as {INDEX}/cu12/torch{torch}/{PROJECT}"
        )
    return f"{INDEX}/{PROJECT}/{name}"
