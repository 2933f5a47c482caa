"""Makes the parts that wheels are put together from, each once, in a folder of its own.

A part's label says what it was made from, so one that stands is taken as it is, also where another
machine has made it, and one of other sources is made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from build_tools import compilers, fetch, jobs, kernels, native, ninja
from build_tools.arch import Arch
from build_tools.codegen import Unit, units
from build_tools.manifest import sha256
from build_tools.matrix_facts import Platform, load, numbers
from build_tools.ninja import BuildError
from build_tools.parts import headers, make_part
from build_tools.paths import BUILD, CSRC, KERNELS, PACKAGE, ROOT
from build_tools.sbom import Piece
from build_tools.wheel_parts import HostPart, KernelsPart, Part, ShimPart

# Where parts stand unless a command says otherwise.
STORE = BUILD / "wheel-parts"
LABEL = "part.json"
# What a shim is linked with: empty libraries by these names, so that any machine can link it.
STUBS = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


@dataclass(frozen=True)
class Made:
    """A part that stands in a folder; its files are named as a wheel names them."""

    folder: Path
    piece: Piece

    def file(self, name: str) -> Path:
        """Where a file of a wheel stands."""
        return self.folder / Path(name).relative_to(PACKAGE.name)


def make(part: Part, store: Path) -> Made:
    """The part, made now unless it stands already."""
    made = standing(part, store)
    if made is not None:
        return made
    folder, digest = store / part.name, digest_of(part)
    print(f"making {part.name}", flush=True)
    fresh = folder.with_name(f"{part.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    label(fresh, digest, _make(part, fresh, store))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)
    made = standing(part, store)
    if made is None:
        raise BuildError(f"the sources of {part.name} changed while it was made: make it again")
    return made


def label(folder: Path, digest: str, made_with: Mapping[str, str]) -> None:
    """Writes the label of a part whose files stand in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    words = {"digest": digest, "made_with": made_with, "files": hashes}
    (folder / LABEL).write_text(json.dumps(words, indent=1) + "\n", "utf-8")


def make_all(parts: Iterable[Part], store: Path) -> dict[Part, Made]:
    """All of them; BuildError, before anything is made, if one cannot be made here."""
    parts = list(parts)
    for part in parts:
        if standing(part, store) is None:
            _check_that_it_is_made_here(part, store)
    return {part: make(part, store) for part in parts}


def digest_of(part: Part) -> str:
    """A hash of all that decides what a part is, but for the C++ compiler, which is not pinned."""
    if isinstance(part, KernelsPart):
        arch = Arch.parse(part.arch)
        made_from = [make_part(unit, arch, part.cuda.nvrtc, Path()).digest for unit in _units(part)]
    else:
        made_from = [_digest_of_sources("host" if isinstance(part, HostPart) else "torch")]
    words = json.dumps([part.name, part.needs, made_from])
    return hashlib.sha256(words.encode()).hexdigest()


def standing(part: Part, store: Path) -> Optional[Made]:
    """The part, if what stands in its folder is of these sources and whole."""
    folder = store / part.name
    try:
        words = json.loads((folder / LABEL).read_text("utf-8"))
        is_whole = all(sha256(folder / name) == found for name, found in words["files"].items())
        is_current = words["digest"] == digest_of(part)
        files = tuple(f"{PACKAGE.name}/{name}" for name in words["files"])
        piece = Piece(part.name, words["made_with"], files)
    except (OSError, ValueError, KeyError):
        return None
    return Made(folder, piece) if is_whole and is_current else None


def _digest_of_sources(folder: str) -> str:
    digest = hashlib.sha256(Path(native.__file__).read_bytes())
    for name in native.sources(folder):
        text = (ROOT / name).read_text("utf-8")
        for path in (ROOT / name, *headers(text)):
            digest.update(path.relative_to(CSRC).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _units(part: KernelsPart) -> list[Unit]:
    return [unit for unit in units() if part.arch in unit.archs]


def _check_that_it_is_made_here(part: Part, store: Path) -> None:
    if isinstance(part, KernelsPart):
        return
    here, there = platform_of_compiler(), part.platform.name
    if there == "win_amd64":
        raise BuildError(
            f"{part.name} cannot be made, here or elsewhere: nothing compiles parts for {there} "
            "yet; `build --only '*linux*'` leaves its wheels out"
        )
    if here != there:
        cxx = " ".join(native.compiler())
        raise BuildError(
            f"{part.name} cannot be made here: {cxx} compiles for {here}. Make it "
            f"where one compiles for {there}, by `python -m build_tools part {part.name}`, and "
            f"copy {store.name}/{part.name} from there, or let CXX name a compiler for it"
        )


def platform_of_compiler() -> str:
    """What the C++ compiler compiles for, by the names of the matrix."""
    command = [*native.compiler(), "-dumpmachine"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    words = told.split("-")
    return f"linux_{words[0]}" if "linux" in words else told or "an unknown machine"


def compiler_version() -> str:
    """The first line of what the C++ compiler says of itself."""
    command = [*native.compiler(), "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return told.splitlines()[0]


def _make(part: Part, folder: Path, store: Path) -> dict[str, str]:
    """Fills a folder; what it was made for and with."""
    if isinstance(part, KernelsPart):
        return _make_kernels(part, folder)
    _check_that_it_is_made_here(part, store)
    if isinstance(part, HostPart):
        native.host(folder / native.HOST_LIBRARY)
        return {"platform": part.platform.name, "compiler": compiler_version()}
    return _make_shim(part, folder, make(HostPart(part.platform), store))


def _make_kernels(part: KernelsPart, folder: Path) -> dict[str, str]:
    arch, compiler = Arch.parse(part.arch), compilers.Nvrtc(fetch.nvrtc(part.cuda))
    planned = kernels.plan(compiler, [arch], folder=kernels.PARTS)
    images = [image for image in planned if image.arch == arch]
    kernels.PARTS.mkdir(parents=True, exist_ok=True)
    count = jobs.choose(None, (x.facts().peak_mb for x in images if x.is_built))
    ninja.build(images, "nvrtc", str(compiler.path), kernels.PARTS, count)
    for warning in kernels.warnings(images):
        print(warning, flush=True)
    if any(image.facts().remark for image in images):
        raise BuildError(
            f"{part.name} is not for a release: ptxas makes products wait for each other, as told "
            "above; tests/build_tools/test_machine_code.py compiles kernels with every NVRTC of "
            "matrix.toml"
        )
    kernels.install(images, folder / KERNELS.name)
    return {"cuda": part.cuda.name, "arch": part.arch, "compiler": part.cuda.nvrtc}


def _make_shim(part: ShimPart, folder: Path, host: Made) -> dict[str, str]:
    major, minor = numbers(part.headers)[:2]
    torch = native.Torch(
        version=(major, minor),
        include=fetch.torch_headers(part.headers, load().headers_from),
        lib=_stubs(part.platform),
        cxx11_abi=part.cxx11abi != "FALSE",
    )
    library = host.folder / native.HOST_LIBRARY
    native.shim(folder / native.shim_name(torch), library, torch, is_portable=True)
    return {
        "platform": part.platform.name,
        "torch": part.serves,
        "headers": f"torch {part.headers}",
        **({"cxx11abi": part.cxx11abi} if part.cxx11abi else {}),
        "compiler": compiler_version(),
    }


def _stubs(platform: Platform) -> Path:
    folder = BUILD / "stubs" / platform.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in STUBS:
        options = ["-shared", "-nostdlib", "-x", "c", f"-Wl,-soname,{name}", "/dev/null"]
        native.run([*native.compiler(), *options, "-o", str(folder / name)])
    return folder
