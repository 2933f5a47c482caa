"""Rules about what is compiled: tags, libraries, symbols, kernels.

A rule returns what it saw, in a line, or raises `Broken`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from build_tools import codegen, elf, kernel_index, native
from build_tools.audit_wheel import AuditedWheel, Broken, Context, Skipped
from build_tools.fetch import TorchLibraries
from build_tools.matrix_facts import numbers
from build_tools.wheel_parts import shims

MACHINES = {"linux_x86_64": elf.X86_64, "linux_aarch64": elf.AARCH64}
# What systems of manylinux_2_28 have: glibc 2.28, and the libraries of GCC 8.
MANYLINUX_2_28 = {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11", "GCC": "8.0.0"}
SYSTEM = (
    "libc.so.6", "libdl.so.2", "libpthread.so.0", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
)  # fmt: skip
TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
OWN = ("_shim_stable.so", "_shim_torch*_cxx11abi*.so", native.HOST_LIBRARY)
_STABLE = re.compile(r"(?:aoti_torch_|torch_|flash_)\w+")
_PYTHON = re.compile(r"_?Py[A-Z_]\w*")


def python_tag(wheel: AuditedWheel, context: Context) -> str:
    """Any Python will do: nothing speaks Python's C API."""
    for name, library in wheel.libraries.items():
        spoken = [x.name for x in library.symbols if _PYTHON.fullmatch(x.name)]
        linked = [x for x in library.needed if x.startswith("libpython")]
        if spoken or linked:
            raise Broken(f"{name} has {(spoken or linked)[0]}: it is bound to a Python")
    return "nothing speaks Python's C API"


def platform_tag(wheel: AuditedWheel, context: Context) -> str:
    """Every system of the platform runs it: its machine, its glibc and its libstdc++."""
    platform = wheel.platform(context.matrix).name
    for name, library in wheel.libraries.items():
        if library.machine != MACHINES[platform]:
            raise Broken(f"{name} is for machine {library.machine}, not for {platform}")
        newer = library.newer_than(MANYLINUX_2_28)
        if newer:
            raise Broken(f"{name} asks for {', '.join(newer)}, which manylinux_2_28 has not")
    asked = {x.version for library in wheel.libraries.values() for x in library.wanted if x.version}
    newest: dict[str, str] = {}
    for name, number in sorted((x.partition("_")[::2] for x in asked), key=lambda x: numbers(x[1])):
        newest[name] = f"{name}_{number}"
    return f"{platform}, {', '.join(sorted(newest.values()))}"


def vendored(wheel: AuditedWheel, context: Context) -> str:
    """Nothing of CUDA or torch goes along, and nothing but torch and the system is linked."""
    for name, library in wheel.libraries.items():
        if not any(fnmatchcase(name, pattern) for pattern in OWN):
            raise Broken(f"{name} is not this project's")
        strange = set(library.needed) - {*SYSTEM, *TORCH, native.HOST_LIBRARY}
        if strange:
            raise Broken(f"{name} is linked with {', '.join(sorted(strange))}")
        if library.run_path not in ("", "$ORIGIN"):
            raise Broken(f"{name} looks for libraries in {library.run_path}")
    return ", ".join(sorted(wheel.libraries))


def shims_for_torches(wheel: AuditedWheel, context: Context) -> str:
    """For every torch that METADATA admits there is a shim, of each C++ ABI that is in use."""
    matrix, torches = context.matrix, wheel.claimed_torches(context.matrix)
    if not torches:
        raise Skipped("METADATA admits no torch of the matrix")
    if native.HOST_LIBRARY not in wheel.libraries:
        raise Broken(f"there is no {native.HOST_LIBRARY}")
    wanted = [
        (torch.name, part.cxx11abi)
        for torch in torches
        for part in shims(matrix.facts, torch, wheel.platform(matrix))
    ]
    files = {native.shim_file(numbers(torch), abi == "TRUE"): torch for torch, abi in wanted}
    for file, torch in files.items():
        if file not in wheel.libraries:
            raise Broken(f"{file} is missing, which torch {torch} needs")
    more = sorted(set(wheel.shims) - set(files))
    if more:
        raise Broken(f"{more[0]} is for a torch that METADATA does not admit")
    return f"{len(files)} for torch {', '.join(torch.name for torch in torches)}"


def architectures(wheel: AuditedWheel, context: Context) -> str:
    """The compiled kernels are for what the table and the bill say, and all of them are there."""
    images = wheel.images
    odd = sorted({row.file for row in wheel.index} ^ set(images))
    if odd:
        raise Broken(f"{odd[0]} is in the table or in the wheel, not in both")
    for row in wheel.index:
        _check_image(row, images[row.file].data)
    archs = kernel_index.archs(wheel.index)
    for arch in archs:
        wanted = {unit.symbol for unit in codegen.units() if str(arch) in unit.archs}
        found = {row.symbol for row in wheel.index if row.arch == arch}
        if found != wanted:
            raise Broken(f"for {arch}, {sorted(found ^ wanted)[0]} is missing or not known")
    billed = sorted(piece.made_with["arch"] for piece in wheel.pieces if "arch" in piece.made_with)
    if billed != sorted(map(str, archs)):
        raise Broken(f"the bill has kernels for {', '.join(billed)}, the table for other ones")
    return f"{', '.join(map(str, archs))}: {len(images)} images, as compiled"


def _check_image(row: kernel_index.Row, data: bytes) -> None:
    if row.arch.is_ptx:
        text = data.rstrip(b"\0").decode()
        found = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        told = found[1].replace("sm_", "compute_") if found else "nothing"
        has_kernel = f".entry {row.symbol}(" in text
    else:
        try:
            image = elf.read(data)
            told, has_kernel = image.arch.flag, row.symbol in image.defined
        except elf.ElfError as error:
            raise Broken(f"{row.file}: {error}") from None
    if told != row.arch.flag:
        raise Broken(f"{row.file} is for {told}, not for {row.arch.flag}")
    if not has_kernel:
        raise Broken(f"{row.file} has no kernel {row.symbol}")
    if row.file.split("/")[0] != row.arch.flag:
        raise Broken(f"{row.file} is not in the folder {row.arch.flag}")


def symbols(wheel: AuditedWheel, context: Context) -> str:
    """Everything that the shims ask for is in the libraries of each torch that they serve."""
    host = wheel.libraries.get(native.HOST_LIBRARY)
    own = host.defined if host else frozenset()
    compared, without = [], set(wheel.shims)
    for torch, name in _served(wheel, context):
        compared.append(torch)
        without.discard(name)
        lacking = [
            x.name
            for x in wheel.libraries[name].wanted
            if not x.version and x.name not in own and x.name not in torch.exports
            if not x.is_weak or (torch.has_cuda and x.name.startswith("aoti_torch_"))
        ]
        if lacking:
            raise Broken(f"{name}: {torch} has no {lacking[0]}; {len(lacking)} are lacking")
    if not compared:
        raise Skipped("no torch that it is for is at hand")
    untold = f"; none at hand for {', '.join(sorted(without))}" if without else ""
    return f"{', '.join(map(str, compared))}{untold}"


def torches_at_hand(wheel: AuditedWheel, context: Context) -> str:
    """Every torch that it is for was at hand to compare symbols with."""
    claimed = [torch.name for torch in wheel.claimed_torches(context.matrix)]
    here = {torch.minor for torch, _ in _served(wheel, context)}
    absent = [name for name in claimed if name not in here]
    if absent:
        raise Skipped(f"without torch {', '.join(absent)}: `audit --fetch` brings them")
    return f"{len(claimed)} minor versions"


def _served(wheel: AuditedWheel, context: Context) -> Iterator[tuple[TorchLibraries, str]]:
    """Torches at hand with the shim that serves each."""
    claimed = {torch.name for torch in wheel.claimed_torches(context.matrix)}
    for torch in context.torches:
        name = native.shim_file(numbers(torch.minor), torch.cxx11abi == "TRUE")
        if torch.minor in claimed and name in wheel.libraries:
            yield torch, name


def stable_abi(wheel: AuditedWheel, context: Context) -> str:
    """The shim for torch 2.10 and later asks torch for C functions of its stable ABI alone."""
    shim = wheel.libraries.get(native.STABLE_SHIM)
    if shim is None:
        raise Skipped(f"there is no {native.STABLE_SHIM}")
    asked = [x.name for x in shim.wanted if not x.version and not x.is_weak]
    others = [name for name in asked if not _STABLE.fullmatch(name)]
    if others:
        raise Broken(f"{native.STABLE_SHIM} asks for {others[0]}, nor is it the only one")
    return f"{len(asked)} C functions"


RULES = (
    python_tag,
    platform_tag,
    vendored,
    shims_for_torches,
    architectures,
    symbols,
    torches_at_hand,
    stable_abi,
)
