"""The host library and the torch shims: what a C++ compiler builds in seconds."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from build_tools.ninja import BuildError
from build_tools.paths import BUILD, CSRC, PACKAGE, ROOT, env

HOST_LIBRARY = "libflash_attn_host.so"
# One shim serves every torch from this one on.
STABLE_SHIM, STABLE_SINCE = "_shim_stable.so", (2, 10)
WARNINGS = ("-Wall", "-Wextra", "-Werror")
# No C++ runtime: an exception, RTTI or a guarded static would pull it in.
HOST_FLAGS = (
    "-std=c++17", "-O2", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
    "-fvisibility=hidden",
)  # fmt: skip
SHIM_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden")


@dataclass(frozen=True)
class Torch:
    """What a shim needs of a torch: headers, libraries to link with, version."""

    version: tuple[int, int]
    include: Path
    lib: Path
    cxx11_abi: bool

    @property
    def is_stable(self) -> bool:
        """Whether the one shim of the stable ABI serves it."""
        return self.version >= STABLE_SINCE


def compiler(program: Optional[str] = None) -> list[str]:
    """The C++ compiler with its options: `program`, CXX, else the first of the usual names."""
    if program:
        return [program]
    asked = env.CXX.text()
    if asked:
        words = shlex.split(asked)
        if shutil.which(words[0]) is None:
            name = env.CXX.name
            raise BuildError(
                f"{name} is set to {asked!r}, and there is no program {words[0]!r}; it must be a "
                "C++ compiler, with options after it"
            )
        return words
    found = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not found:
        raise BuildError("no C++ compiler: install g++ or clang, or set CXX")
    return [found]


def run(command: Sequence[str]) -> None:
    """Runs a compiler in the project's root, where sources have short names."""
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if child.returncode:
        raise BuildError(f"{' '.join(command)}\n{child.stdout}{child.stderr}")


def sources(folder: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (CSRC / folder).glob("*.cpp"))


def host(target: Path = PACKAGE / HOST_LIBRARY, cxx: Optional[str] = None) -> Path:
    """Builds the host library: needs libc, and nothing of CUDA, torch or C++ at run time."""
    flags = [*HOST_FLAGS, *WARNINGS, "-Icsrc", "-shared", "-Wl,-s"]
    if target.suffix == ".dll":
        flags += ["-static", "-static-libgcc"]
        libraries = []
    else:
        flags += ["-fPIC", "-nodefaultlibs", f"-Wl,-soname,{target.name}", "-Wl,-z,defs"]
        # dlopen has a library of its own before glibc 2.34, so that one is needed wherever this is
        # built. -lgcc holds helpers of the compiler itself; it is static and hidden.
        libraries = ["-lpthread", "-Wl,--no-as-needed,-l:libdl.so.2,--as-needed", "-lc", "-lgcc"]
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler(cxx), *flags, *sources("host"), "-o", str(target), *libraries])
    return target


def find_torch(python: str = sys.executable) -> Torch:
    """The torch of a Python, asked in a process of its own."""
    program = (
        "import torch, pathlib\n"
        "base = pathlib.Path(torch.__file__).parent\n"
        "print(torch.__version__, int(torch._C._GLIBCXX_USE_CXX11_ABI), base, sep='\\n')"
    )
    # -E: an isolated build hides the environment around it by variables such as PYTHONPATH.
    for options in ((), ("-E",)):
        command = [python, *options, "-c", program]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        told = child.stdout.strip().split("\n")[-3:]
        if child.returncode == 0 and len(told) == 3:
            break
    else:
        raise BuildError(f"{python} cannot import torch, whose headers the shim needs")
    version, abi, base = told
    major, minor = version.split(".")[:2]
    return Torch((int(major), int(minor)), Path(base, "include"), Path(base, "lib"), abi == "1")


def shim_name(torch: Torch) -> str:
    """File of the shim that serves this torch."""
    return shim_file(torch.version, torch.cxx11_abi)


def shim_file(version: tuple[int, ...], cxx11_abi: bool) -> str:
    """File of the shim for a version of torch; `backends/cuda.py` looks for the same names."""
    if version >= STABLE_SINCE:
        return STABLE_SHIM
    return f"_shim_torch{version[0]}_{version[1]}_cxx11abi{'TRUE' if cxx11_abi else 'FALSE'}.so"


def shim(
    target: Optional[Path] = None,
    host_library: Path = PACKAGE / HOST_LIBRARY,
    torch: Optional[Torch] = None,
    cxx: Optional[str] = None,
    is_portable: bool = False,
) -> Path:
    """Builds the shim for a torch, beside the host library that it finds through $ORIGIN.

    With the full ABI both sides must share one libstdc++: strings of torch 2.4 to 2.6 are freed
    where they were not made. The stable ABI passes no C++ types, so there it is linked in and
    hidden, because the compiler's may be newer than the one that an environment brings. libgcc_s
    stays shared: an exception that crosses two unwinders ends the process.

    Args:
        is_portable: for wheels, that run on systems older than this one: the libstdc++ linked in
            asks for the glibc of this machine, the one that torch has loaded for nothing.
    """
    torch = torch or find_torch()
    target = target or PACKAGE / shim_name(torch)
    if not host_library.exists():
        host(host_library)
    flags = [*SHIM_FLAGS, *WARNINGS, *abi_flags(torch), "-Icsrc", *_torch_includes(torch)]
    # Messages of torch's headers name their file, g++'s behind links; no path of this machine goes
    # along.
    for folder in (torch.include, torch.include.resolve()):
        flags.append(f"-ffile-prefix-map={folder}/=")
    command = compiler(cxx)
    objects = BUILD / "shim" / target.stem
    objects.mkdir(parents=True, exist_ok=True)
    made = {source: objects / f"{Path(source).stem}.o" for source in sources("torch")}
    with ThreadPoolExecutor(2) as pool:
        commands = [[*command, *flags, "-c", src, "-o", str(obj)] for src, obj in made.items()]
        list(pool.map(run, commands))
    run([
        *command, "-shared", *map(str, made.values()), "-o", str(target),
        f"-L{host_library.parent}", f"-l:{host_library.name}", "-Wl,-rpath,$ORIGIN",
        f"-L{torch.lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu",
        *([] if torch.is_stable else ["-lc10"]),
        *(["-static-libstdc++"] if torch.is_stable and not is_portable else []),
        "-Wl,--as-needed", "-Wl,--exclude-libs,ALL", "-Wl,-s",
    ])  # fmt: skip
    return target


def abi_flags(torch: Torch) -> list[str]:
    if torch.is_stable:
        return ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    return ["-DFLASH_FULL_ABI", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}"]


def _torch_includes(torch: Torch) -> list[str]:
    folders = (torch.include, torch.include / "torch/csrc/api/include")
    return [word for folder in folders for word in ("-isystem", str(folder))]
