"""The two compilers of device code: NVRTC, a library from PyPI, and nvcc.

Either turns one unit into a cubin or PTX and says what the kernel uses.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Optional, Protocol

from build_tools.arch import Arch
from build_tools.paths import CSRC, env, package_folders

FLAGS = ("-std=c++17", "--ptxas-options=-v")
# config.h is read by the host too, so its functions bear no CUDA words: each compiler has its own
# way to let device code call them.
NVRTC_FLAGS = ("--device-as-default-execution-space",)
NVCC_FLAGS = ("--expt-relaxed-constexpr",)
INCLUDE_DIRS = (CSRC, CSRC / "device")
# Older ones spill registers where these do not, and know no architecture after 9.0.
OLDEST_NVRTC = (12, 8)
TO_INSTALL = "pip install 'nvidia-cuda-nvrtc-cu12>={}.{}' ninja".format(*OLDEST_NVRTC)


class CompileError(RuntimeError):
    """What the compiler said of a source that it refused."""


class Compiler(Protocol):
    """A compiler of device code."""

    path: Path

    @property
    def identity(self) -> str:
        """Name and version, part of the address of what it makes."""

    def supports(self, arch: Arch) -> bool:
        """Whether it knows an architecture."""

    def compile(self, source: str, arch: Arch) -> tuple[bytes, str]:
        """(code, log)."""


class Nvrtc:
    """NVRTC through ctypes: no toolkit, no host compiler, one process."""

    def __init__(self, library: Optional[Path] = None) -> None:
        self.path = library or find_nvrtc()
        # NVRTC opens its builtins by bare name: found only if they are loaded already.
        self._builtins = [
            ctypes.CDLL(str(path))
            for path in self.path.parent.glob("libnvrtc-builtins.so.*")
            if ".alt." not in path.name
        ]
        self._lib = ctypes.CDLL(str(self.path))
        self.version = version_of(self.path)
        if not any(self.version):
            raise ValueError(f"{self.path} is no NVRTC: it does not tell its version")

    @property
    def identity(self) -> str:
        # Patch releases share a version number; the library's size tells them apart.
        return f"nvrtc {self.version[0]}.{self.version[1]} {self.path.stat().st_size}"

    def supports(self, arch: Arch) -> bool:
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        archs = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(archs))
        return arch.number in archs

    def compile(self, source: str, arch: Arch) -> tuple[bytes, str]:
        program = ctypes.c_void_p()
        text = source.encode()
        created = self._lib.nvrtcCreateProgram(
            ctypes.byref(program), text, b"unit.cu", 0, None, None
        )
        self._check(created)
        try:
            options = [*FLAGS, *NVRTC_FLAGS, f"--gpu-architecture={arch.flag}"]
            options += [f"-I{folder}" for folder in INCLUDE_DIRS]
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._lib.nvrtcCompileProgram(program, len(options), array)
            log = self._take(program, "nvrtcGetProgramLog").rstrip(b"\0").decode()
            if failed:
                raise CompileError(log or self._words(failed))
            return self._take(program, "nvrtcGetPTX" if arch.is_ptx else "nvrtcGetCUBIN"), log
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _take(self, program: ctypes.c_void_p, getter: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"{getter}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, getter)(program, buffer))
        return buffer.raw

    def _words(self, result: int) -> str:
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        words: bytes = self._lib.nvrtcGetErrorString(result)
        return words.decode()

    def _check(self, result: int) -> None:
        if result:
            raise RuntimeError(f"NVRTC: {self._words(result)}")


class Nvcc:
    """nvcc of a CUDA toolkit."""

    def __init__(self, program: Optional[Path] = None) -> None:
        self.path = program or find_nvcc()
        told = subprocess.run(
            [str(self.path), "--version"], capture_output=True, text=True, check=False
        ).stdout
        found = re.search(r"release (\d+)\.(\d+), V([\d.]+)", told)
        if found is None:
            raise ValueError(f"{self.path} is no nvcc: it does not tell its version")
        self.version = (int(found[1]), int(found[2]))
        self._full_version = found[3]
        # Read here, so that a wrong one is told before anything is compiled.
        self._threads = env.NVCC_THREADS.count() or 1

    @property
    def identity(self) -> str:
        return f"nvcc {self._full_version}"

    @functools.cached_property
    def _archs(self) -> str:
        command = [str(self.path), "--list-gpu-code"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def supports(self, arch: Arch) -> bool:
        return f"sm_{arch.number}{arch.suffix}" in self._archs.split()

    def compile(self, source: str, arch: Arch) -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory() as folder:
            unit, code = Path(folder, "unit.cu"), Path(folder, f"unit.{arch.form}")
            unit.write_text(source, "utf-8")
            command = [str(self.path), f"--{arch.form}", f"-arch={arch.flag}", *FLAGS, *NVCC_FLAGS]
            command += [f"--threads={self._threads}"]
            command += [f"-I{path}" for path in INCLUDE_DIRS] + ["-o", str(code), str(unit)]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if child.returncode:
                raise CompileError(child.stdout + child.stderr)
            return code.read_bytes(), child.stdout + child.stderr


def make(name: str, path: Optional[str]) -> Compiler:
    """The compiler called `nvrtc` or `nvcc`, at `path` if given."""
    where = Path(path) if path else None
    return Nvcc(where) if name == "nvcc" else Nvrtc(where)


def find_nvrtc() -> Path:
    """The newest NVRTC among Python packages, else that of a toolkit."""
    packages = [
        path
        for folder in package_folders()
        for pattern in ("*/lib/libnvrtc.so.*", "*/bin/**/nvrtc64_*.dll")
        for path in Path(folder, "nvidia").glob(pattern)
    ]
    toolkit = Path(env.CUDA_HOME.text() or "/usr/local/cuda")
    newest = 0, 0
    for found in (packages, [*toolkit.glob("lib64/libnvrtc.so.*")]):
        versions = {path.resolve(): version_of(path) for path in found if ".alt." not in path.name}
        served = [path for path, version in versions.items() if version >= OLDEST_NVRTC]
        if served:
            return max(served, key=lambda path: versions[path])
        newest = max([newest, *versions.values()])
    oldest = ".".join(map(str, OLDEST_NVRTC))
    older = ", only {}.{}".format(*newest) if any(newest) else ""
    raise FileNotFoundError(
        f"NVRTC {oldest} or later, the compiler of the kernels, is not installed{older}: "
        f"`{TO_INSTALL}`"
    )


def version_of(library: Path) -> tuple[int, int]:
    """The version of an NVRTC; (0, 0) of one that does not load here, or is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    try:
        ctypes.CDLL(str(library)).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    except (OSError, AttributeError):
        return 0, 0
    return major.value, minor.value


def find_nvcc() -> Path:
    home = env.CUDA_HOME.text()
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if found is None:
        raise FileNotFoundError("nvcc is not on the PATH, nor under CUDA_HOME")
    return Path(found)
