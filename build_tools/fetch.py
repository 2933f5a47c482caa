"""What parts are made with, brought by pip in pinned releases: NVRTC, and torch's headers.

Of a torch only the headers stay, and the names that its libraries export: half a gigabyte is
downloaded, and sixty megabytes are kept.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from build_tools import elf
from build_tools.matrix_facts import Cuda, Platform, numbers
from build_tools.ninja import BuildError
from build_tools.paths import BUILD

FETCHED = BUILD / "fetched"
# Every torch of the matrix has a wheel for it; headers and libraries depend on it in nothing.
PYTHON = "3.12"
LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")
EXPORTS = "exports.txt.gz"
# Throws from TORCH_CHECK; its last argument is a string, whose name tells the two C++ ABIs apart.
_OLD_ABI = "_ZN3c106detail14torchCheckFailEPKcS2_jRKSs"


class TorchLibraries:
    """A torch as what is linked against it sees it.

    Args:
        release: its version.
        origin: where it comes from, in a word.
        read: gives the names that its libraries export.
    """

    def __init__(self, release: str, origin: str, read: Callable[[], Iterable[str]]) -> None:
        self.release, self.origin, self._read = release, origin, read

    @property
    def minor(self) -> str:
        return ".".join(self.release.split(".")[:2])

    @cached_property
    def exports(self) -> frozenset[str]:
        return frozenset(self._read())

    @property
    def cxx11abi(self) -> str:
        return "FALSE" if _OLD_ABI in self.exports else "TRUE"

    @property
    def has_cuda(self) -> bool:
        """Whether it is built with CUDA."""
        return "_ZN2at4cuda26getCurrentDevicePropertiesEv" in self.exports

    def __str__(self) -> str:
        return f"torch {self.release} {self.origin}"


def nvrtc(cuda: Cuda) -> Path:
    """The library of the pinned NVRTC."""
    folder = FETCHED / cuda.nvrtc.replace("==", "-")
    if not folder.exists():
        _fetch(cuda.nvrtc, folder, (), _unpack_libraries)
    libraries = folder.glob("libnvrtc.so.*")
    found = [path for path in libraries if ".alt." not in path.name]
    if len(found) != 1:
        raise BuildError(f"{folder} should have one libnvrtc.so.*; remove it to fetch it again")
    return found[0]


def torch_headers(release: str, platform: Platform) -> Path:
    """The include folder of a release of torch."""
    return _torch(release, platform) / "include"


def torch_libraries(release: str, platform: Platform) -> TorchLibraries:
    """The libraries of a release of torch."""
    folder = _torch(release, platform)
    return TorchLibraries(release, f"for {platform.name}", lambda: _exports(folder))


def fetched_torches(platform: Platform) -> list[TorchLibraries]:
    """The torches for a platform that were fetched before, oldest first."""
    folders = [path for path in FETCHED.glob(f"torch-*-{platform.name}") if path.is_dir()]
    releases = (path.name.split("-")[1] for path in folders)
    return [torch_libraries(release, platform) for release in sorted(releases, key=numbers)]


def installed_torch(python: str) -> TorchLibraries:
    """The torch of a Python."""
    program = (
        "from importlib import metadata as m, util as u\n"
        "print(m.version('torch'), u.find_spec('torch').origin)"
    )
    child = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    if child.returncode:
        raise BuildError(f"{python} has no torch, whose libraries are asked for")
    version, module = child.stdout.strip().split(" ", 1)
    folder = Path(module).parent
    files = [file for name in LIBRARIES if (file := Path(folder, "lib", name)).exists()]

    def names() -> Iterator[str]:
        for file in files:
            yield from elf.read(file).defined

    return TorchLibraries(version, "installed", names)


def _torch(release: str, platform: Platform) -> Path:
    folder = FETCHED / f"torch-{release}-{platform.name}"
    if not folder.exists():
        machine = platform.tag.split("_", 3)[-1]
        tags = [f"{name}_{machine}" for name in ("manylinux_2_28", "manylinux2014", "manylinux1")]
        options = [f"--platform={tag}" for tag in tags] + [f"--python-version={PYTHON}"]
        _fetch(f"torch=={release}", folder, options, _unpack_torch)
    return folder


def _fetch(
    requirement: str,
    folder: Path,
    options: Iterable[str],
    unpack: Callable[[zipfile.ZipFile, Path], None],
) -> None:
    """Downloads a wheel and unpacks what is needed of it; the folder appears when it is whole."""
    print(f"fetching {requirement}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh, wheels = Path(scratch, "fresh"), Path(scratch, "wheels")
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
            "--only-binary=:all:", "--disable-pip-version-check", f"--dest={wheels}",
            *options, requirement,
        ]  # fmt: skip
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            raise BuildError(f"{requirement} cannot be downloaded:\n{child.stdout}{child.stderr}")
        fresh.mkdir()
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                unpack(archive, fresh)
        try:
            fresh.replace(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise


def _unpack_libraries(archive: zipfile.ZipFile, folder: Path) -> None:
    for name in archive.namelist():
        if "/lib/" in name and ".so" in name:
            _copy(archive, name, folder / Path(name).name)


def _unpack_torch(archive: zipfile.ZipFile, folder: Path) -> None:
    names = archive.namelist()
    for name in names:
        if name.startswith("torch/include/") and not name.endswith("/"):
            _copy(archive, name, folder / name.partition("/")[2])
    exports: set[str] = set()
    for library in LIBRARIES:
        if f"torch/lib/{library}" in names:
            _copy(archive, f"torch/lib/{library}", folder / library)
            exports |= elf.read(folder / library).defined
            (folder / library).unlink()
    with gzip.open(folder / EXPORTS, "wt", encoding="utf-8") as file:
        file.write("\n".join(sorted(exports)))


def _copy(archive: zipfile.ZipFile, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def _exports(folder: Path) -> list[str]:
    with gzip.open(folder / EXPORTS, "rt", encoding="utf-8") as file:
        return file.read().split("\n")
