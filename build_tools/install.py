"""What `pip install .` makes: the package alone, or with the kernels compiled for this machine.

`builds_kernels` decides, from the environment and from the GPUs here. The commands below then put
the kernels, the host library and the shim into the wheel and mark it for this platform. Where a
finished wheel is taken instead, by prebuilt.py, none of this runs.
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any, ClassVar, Optional

from setuptools import Command, Distribution
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import ExecError, OptionError

from build_tools import arch, kernels, native, prebuilt
from build_tools.messages import announce
from build_tools.ninja import BuildError, find_ninja
from build_tools.paths import BUILD, KERNELS, PACKAGE, ROOT, env

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

STAGE = BUILD / "stage"
WITHOUT = f"{env.FLASH_ATTENTION_SKIP_CUDA_BUILD.name}=TRUE installs the package without kernels."

AGAIN = (
    "After a change of torch install again, with `--no-cache-dir` (pip) or "
    "`--refresh-package flash-attn` (uv)."
)


@contextmanager
def telling() -> Iterator[None]:
    """Turns what goes wrong in compiling into an error that setuptools shows in one message."""
    try:
        yield
    except (BuildError, OSError, ValueError) as error:
        raise ExecError(f"the CUDA kernels cannot be built: {error}\nhint: {WITHOUT}") from None


@cache
def builds_kernels() -> bool:
    """Whether this installation compiles: on request, or for a GPU here that kernels serve."""
    skip, force = env.FLASH_ATTENTION_SKIP_CUDA_BUILD, env.FLASH_ATTENTION_FORCE_BUILD
    try:
        is_skipped, is_forced = skip.is_true(), force.is_true()
        mode = prebuilt.mode()
    except ValueError as error:
        raise OptionError(str(error)) from None
    if is_skipped or mode == prebuilt.PREBUILT:
        return False
    is_asked = is_forced or mode == prebuilt.SOURCE or env.FLASH_ATTN_CUDA_ARCHS.text() is not None
    if not sys.platform.startswith("linux"):
        if is_asked and not prebuilt.is_sought():
            raise OptionError(f"CUDA kernels are built on Linux only. {WITHOUT}")
        return False
    return is_asked or any(kernels.is_served(gpu) for gpu in arch.local_gpus())


@cache
def torch_here() -> native.Torch:
    """The torch that the shim is built for."""
    found = native.find_torch()
    is_forced = env.FLASH_ATTENTION_FORCE_CXX11_ABI.is_true()
    return replace(found, cxx11_abi=True) if is_forced else found


@contextmanager
def turn() -> Iterator[None]:
    """Waits until no other installation builds in this checkout, and keeps others waiting.

    They share folders under `build`, which each empties when it begins.
    """
    try:
        BUILD.mkdir(exist_ok=True)
        file = (BUILD / "lock").open("wb")
    except OSError:  # the build itself says what it cannot write
        yield
        return
    with file:
        if not _is_locked(file):
            announce(f"another installation builds in {ROOT}; waiting for it to end")
            while not _is_locked(file):
                time.sleep(0.2)
        yield


def _is_locked(file: IO[bytes]) -> bool:
    """Whether the lock is had now; nobody else will have it while the file is open."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Of a file system without locks nobody can tell; it shall not wait for ever.
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def make(folder: Path) -> None:
    """Compiles everything into a folder; what takes seconds comes first, to fail early."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    find_ninja()
    torch = torch_here()
    host = native.host(folder / native.HOST_LIBRARY)
    native.shim(folder / native.shim_name(torch), host, torch)
    kernels.build(target=folder / KERNELS.name)


def place(made: Path, package: Path) -> None:
    """Copies what was made into a package; what stood there goes once all of it is copied."""
    fresh = package / f"{KERNELS.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        for source in made.rglob("*"):
            if source.is_file():
                target = fresh / source.relative_to(made)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for old in (*package.glob("*.so"), package / KERNELS.name):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    for new in fresh.iterdir():
        new.replace(package / new.name)
    fresh.rmdir()


class BinaryDistribution(Distribution):
    """The package, which counts as platform-dependent if kernels go with it."""

    def has_ext_modules(self) -> bool:
        return builds_kernels()

    def parse_config_files(self, *arguments: Any, **options: Any) -> None:
        super().parse_config_files(*arguments, **options)
        local = env.FLASH_ATTN_LOCAL_VERSION.text()
        if local is None:
            return
        if not re.fullmatch(r"[A-Za-z0-9]+(?:[-_.][A-Za-z0-9]+)*", local):
            raise SystemExit(  # setuptools shows a traceback of any other error here
                f"error: {env.FLASH_ATTN_LOCAL_VERSION.name} is set to {local!r}; it must be "
                "letters and digits, with dots between"
            )
        self.metadata.version = f"{self.metadata.version}+{local}"


class BuildNative(Command):
    """Compiles; for an editable install the results go beside the sources."""

    description = "compile the CUDA kernels, the host library and the torch shim"
    user_options: ClassVar[list[tuple[str, Optional[str], str]]] = []
    build_lib: Optional[str]
    editable_mode: bool

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        asked = env.FLASH_ATTN_CUDA_ARCHS.text()
        gpus = ", ".join(map(str, arch.local_gpus()))
        announce(f"compiling CUDA kernels for {asked or gpus or 'every architecture'}. {WITHOUT}")
        with telling():
            make(STAGE)
            if not torch_here().is_stable:
                version = "{}.{}".format(*torch_here().version)
                announce(f"what was compiled serves torch {version} alone. {AGAIN}")
            built = Path(self.build_lib or "", PACKAGE.name)
            place(STAGE, PACKAGE if self.editable_mode else built)

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """Starts from an empty folder, so that nothing of an earlier build gets into a wheel."""

    sub_commands: ClassVar = [("build_native", lambda _: builds_kernels()), *build.sub_commands]

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BdistWheel(bdist_wheel):
    """Tags: any Python, for nothing here speaks Python's C API; this platform if compiled.

    A shim of the full ABI serves one minor version of torch. No tag can say that, so the wheel
    bears it as its build number, e.g. flash_attn-2.8.3-0torch2.8-py3-none-linux_x86_64.whl.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        if builds_kernels():
            with telling():
                if not torch_here().is_stable:
                    self.build_number = "0torch{}.{}".format(*torch_here().version)
        super().run()
