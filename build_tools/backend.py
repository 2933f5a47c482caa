"""The PEP 517 backend: setuptools, which also asks for a compiler where kernels are built.

An isolated build sees only what it asks for here. Nothing here imports torch, and where no kernels
are built it asks for nothing.
"""

from __future__ import annotations

from typing import Any, Optional

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_tools import compilers, install, ninja
from build_tools.paths import package_folders

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = Optional[dict[str, Any]]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *for_kernels()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *for_kernels()]


def for_kernels() -> list[str]:
    """What compiling the kernels needs and this environment lacks."""
    if not install.builds_kernels():
        return []
    wanted = []
    try:
        ninja.find_ninja()
    except ninja.BuildError:
        wanted.append("ninja")
    try:
        compilers.find_nvrtc()
    except FileNotFoundError:
        wanted.append(f"nvidia-cuda-nvrtc-cu12>={'.'.join(map(str, compilers.OLDEST_NVRTC))}")
    # The newest there is, as the package itself will bring.
    if not any((folder / "torch" / "version.py").exists() for folder in package_folders()):
        wanted.append("torch>=2.4")
    return wanted
