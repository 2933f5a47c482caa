"""Rules about a wheel as a file: names, metadata, hashes, sizes, bytes.

A rule returns what it saw, in a line, or raises `Broken`.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from build_tools import assemble, make_parts, sbom
from build_tools.audit_wheel import AuditedWheel, Broken, Context, Skipped
from build_tools.ninja import BuildError
from build_tools.wheel_name import DISTRIBUTION, PROJECT
from build_tools.wheel_parts import Wheel
from build_tools.zip_file import Entries, wheel_order, write

# As long as on the longest path that Windows takes by default it leaves 150 for where it stands.
MAX_PATH = 100
MAX_DOWNLOAD = 40_000_000
TOP_LEVEL = ("flash_attn", "flash_attn_2_cuda", "flash_attn_3", "flash_attn_interface")
_PORTABLE = re.compile(r"[A-Za-z0-9_.+-]+(?:/[A-Za-z0-9_.+-]+)*")
_SOURCE = re.compile(rb"(?<![\w.+-])(?:/[\w.+-]+){2,}\.(?:h|hpp|cpp|cuh|cu)\b")


def file_name(wheel: AuditedWheel, context: Context) -> str:
    """The file name says what METADATA and WHEEL say: else pip refuses it from an index."""
    name, marks = wheel.name, wheel.info_text("WHEEL").splitlines()
    told = {
        "the name": (wheel.metadata["Name"], PROJECT),
        "the version": (wheel.metadata["Version"], name.version),
        "the tags": ([x for x in marks if x.startswith("Tag: ")], [f"Tag: {name.tag}"]),
        "Root-Is-Purelib": ([x for x in marks if x.startswith("Root-Is-")][-1:],
                            ["Root-Is-Purelib: false"]),
    }  # fmt: skip
    for what, (found, wanted) in told.items():
        if found != wanted:
            raise Broken(f"{what}: the file name asks for {wanted}, inside is {found}")
    folders = {x.split("/")[0] for x in wheel.entries if ".dist-info/" in x}
    if folders != {f"{DISTRIBUTION}-{name.version}.dist-info"}:
        raise Broken(f"its metadata is in {', '.join(sorted(folders))}")
    return f"{name.version}, {name.tag}"


def requirements(wheel: AuditedWheel, context: Context) -> str:
    """METADATA lets it be installed with the torches that it serves, and no others."""
    variant, requirement = wheel.name.variant, wheel.torch_requirement
    if variant is not None and requirement != f"=={variant.torch}.*":
        raise Broken(f"it is named for torch {variant.torch} and requires torch{requirement}")
    torches = wheel.claimed_torches(context.matrix)
    if not torches:
        raise Broken(f"torch{requirement} is no minor version of the matrix, nor all from one on")
    if not wheel.metadata["Requires-Python"]:
        raise Broken("METADATA has no Requires-Python")
    return f"torch{requirement}, Python {wheel.metadata['Requires-Python']}"


def record(wheel: AuditedWheel, context: Context) -> str:
    """RECORD lists every file with its hash and size, and nothing else."""
    lines = wheel.info_text("RECORD").splitlines()
    found = dict(line.partition(",")[::2] for line in lines)
    own = next((name for name in wheel.entries if name.endswith(".dist-info/RECORD")), "")
    wanted = {name: x.record for name, x in wheel.entries.items() if name != own} | {own: ","}
    wrong = sorted(x for x in found.keys() | wanted.keys() if found.get(x) != wanted.get(x))
    if wrong or len(lines) != len(wanted):
        raise Broken(f"it is wrong about {', '.join(wrong[:3]) or 'a file that it lists twice'}")
    return f"{len(wanted)} files"


def modules(wheel: AuditedWheel, context: Context) -> str:
    """It installs the published modules, and nothing beside them."""
    tops = {PurePosixPath(PurePosixPath(name).parts[0]).stem for name in wheel.modules}
    if tops != set(TOP_LEVEL):
        raise Broken(f"it installs {', '.join(sorted(tops))}; it should {', '.join(TOP_LEVEL)}")
    listed = wheel.info_text("top_level.txt").split()
    if sorted(listed) != sorted(TOP_LEVEL):
        raise Broken(f"top_level.txt lists {', '.join(listed)}")
    return ", ".join(TOP_LEVEL)


def licence(wheel: AuditedWheel, context: Context) -> str:
    """The licence is named and goes along."""
    expression = wheel.metadata["License-Expression"]
    files = [str(x) for x in wheel.metadata.get_all("License-File", [])]
    if expression != sbom.LICENSE or not files:
        raise Broken(f"METADATA says {expression} and names {files or 'no file'}")
    for file in files:
        wheel.info_text(f"licenses/{file}")
    return f"{expression}, {', '.join(files)}"


def paths(wheel: AuditedWheel, context: Context) -> str:
    """Paths are short, in plain letters, and different where case does not count."""
    for name in wheel.entries:
        if len(name) > MAX_PATH:
            raise Broken(f"{name} has {len(name)} characters; {MAX_PATH} are allowed")
        if not _PORTABLE.fullmatch(name) or ".." in name:
            raise Broken(f"{name!r} is no portable path")
    if len({name.lower() for name in wheel.entries}) != len(wheel.entries):
        raise Broken("two paths differ in case alone")
    longest = max(wheel.entries, key=len)
    return f"{len(longest)} characters at most: {longest}"


def size(wheel: AuditedWheel, context: Context) -> str:
    """The download is small enough for an index and for a person."""
    download = wheel.path.stat().st_size
    if download > MAX_DOWNLOAD:
        raise Broken(f"{download / 1e6:.1f} MB to download; {MAX_DOWNLOAD / 1e6:.0f} are allowed")
    return f"{download / 1e6:.1f} MB to download, {installed(wheel.entries) / 1e6:.1f} MB installed"


def installed(entries: Entries) -> int:
    return sum(len(entry.data) for entry in entries.values())


def bill_of_materials(wheel: AuditedWheel, context: Context) -> str:
    """The bill lists every compiled file, with its hash, and no other."""
    listed = [file for piece in wheel.pieces for file in piece.files]
    compiled = {x: y for x, y in wheel.modules.items() if not x.endswith((".py", ".txt", ".typed"))}
    wrong = sorted(set(listed) ^ set(compiled))
    if wrong or len(listed) != len(compiled):
        raise Broken(f"it is wrong about {', '.join(wrong[:3]) or 'a file that it lists twice'}")
    hashes = sbom.hashes_of(wheel.info_text(assemble.SBOM))
    for name, entry in compiled.items():
        if hashes[name] != entry.sha256:
            raise Broken(f"the hash of {name} is another one")
    return f"CycloneDX, {len(wheel.pieces)} parts of {len(listed)} files"


def reproducible(wheel: AuditedWheel, context: Context) -> str:
    """Nothing in its bytes depends on when, where or in which order it was written."""
    when, names = set(wheel.times), list(wheel.entries)
    if len(when) != 1:
        raise Broken(f"its files bear {len(when)} times")
    if names != wheel_order(wheel.entries):
        raise Broken("its files are not sorted")
    for name, entry in wheel.entries.items():
        found = _SOURCE.search(entry.data) if name.endswith((".so", ".cubin", ".ptx")) else None
        if found:
            raise Broken(f"{name} names a file of the machine it was made on: {found[0].decode()}")
    if write(wheel.entries, names, when.pop()) != wheel.path.read_bytes():
        raise Broken("written again from its own contents it has other bytes")
    return "written again from its own contents it has the same bytes"


def built_again(wheel: AuditedWheel, context: Context) -> str:
    """Built from the parts and sources here, the wheel of its place has the same bytes."""
    path = wheel.path.resolve().as_posix()
    same = [x for x in context.matrix.by_path.values() if path.endswith(f"/{x.path}")]
    if not same:
        raise Skipped("it does not stand where the matrix has it")
    if _built(same[0], context.parts) != wheel.path.read_bytes():
        raise Broken("built from the parts and sources here it has other bytes")
    return f"built again from the {len(same[0].parts)} parts here it has the same bytes"


def _built(wheel: Wheel, store: Path) -> bytes:
    parts = [make_parts.standing(part, store) for part in wheel.parts]
    made = [part for part in parts if part is not None]
    if len(made) != len(parts):
        raise Skipped(f"{len(parts) - len(made)} of its {len(parts)} parts are not here")
    try:
        return assemble.assemble(wheel, assemble.contents_of(assemble.pure_package(), made))
    except BuildError as error:
        raise Skipped(str(error)) from None


RULES = (
    file_name,
    requirements,
    record,
    modules,
    licence,
    paths,
    size,
    bill_of_materials,
    reproducible,
    built_again,
)
