"""What `pip install .` makes: the package alone, or with the kernels compiled for this machine.

`builds_kernels` decides, from the environment and from the GPUs here. The commands below then put
the kernels, the host library and the shim into the wheel and mark it for this platform.
"""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path
from typing import ClassVar, Optional

from setuptools import Command, Distribution
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import ExecError, OptionError

from build_tools import arch, kernels, native
from build_tools.ninja import BuildError, find_ninja
from build_tools.paths import BUILD, KERNELS, PACKAGE, env

STAGE = BUILD / "stage"
WITHOUT = f"{env.FLASH_ATTENTION_SKIP_CUDA_BUILD.name}=TRUE installs the package without kernels."


@cache
def builds_kernels() -> bool:
    """Whether this installation compiles: on request, or for a GPU here that kernels serve."""
    skip, force = env.FLASH_ATTENTION_SKIP_CUDA_BUILD, env.FLASH_ATTENTION_FORCE_BUILD
    try:
        is_skipped, is_forced = skip.is_true(), force.is_true()
    except ValueError as error:
        raise OptionError(str(error)) from None
    if is_skipped and is_forced:
        raise OptionError(f"{skip.name} and {force.name} are both TRUE; one of them can be")
    if is_skipped:
        return False
    is_asked = is_forced or env.FLASH_ATTN_CUDA_ARCHS.text() is not None
    if not sys.platform.startswith("linux"):
        if is_asked:
            raise OptionError(f"CUDA kernels are built on Linux only. {WITHOUT}")
        return False
    return is_asked or any(kernels.is_served(gpu) for gpu in arch.local_gpus())


@cache
def torch_here() -> native.Torch:
    """The torch that the shim is built for."""
    return native.find_torch()


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
    """Copies what was made into a package, in place of what stood there."""
    package.mkdir(parents=True, exist_ok=True)
    for old in (*package.glob("*.so"), package / KERNELS.name):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    shutil.copytree(made, package, dirs_exist_ok=True)


class BinaryDistribution(Distribution):
    """The package, which counts as platform-dependent if kernels go with it."""

    def has_ext_modules(self) -> bool:
        return builds_kernels()


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
        try:
            make(STAGE)
        except (BuildError, OSError, ValueError) as error:
            raise ExecError(f"the CUDA kernels cannot be built: {error}\nhint: {WITHOUT}") from None
        place(STAGE, PACKAGE if self.editable_mode else Path(self.build_lib or "", PACKAGE.name))

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
        if builds_kernels() and not torch_here().is_stable:
            self.build_number = "0torch{}.{}".format(*torch_here().version)
        super().run()
