"""The PEP 517 backend: a finished wheel of a mirror, or setuptools with a compiler for the kernels.

An isolated build sees only what it asks for here. Nothing here imports torch, and where no kernels
are built it asks for nothing. What goes wrong before setuptools runs ends in one message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.errors import OptionError

from build_tools import compilers, install, ninja, prebuilt
from build_tools.messages import announce, log
from build_tools.paths import env, package_folders

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

# `pip install -C no-cuda-extensions=true`, as FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE.
SETTING = "no-cuda-extensions"
# `python -m build --wheel -C parts=DIR`: the universal wheel, from parts that stand in DIR or are
# made there. It is how cibuildwheel asks for it.
PARTS = "parts"
# pip downloads what parts are made with.
FOR_PARTS = ("ninja", "pip", "tomli; python_version < '3.11'")
WITH = (
    f"{env.FLASH_ATTN_CUDA_ARCHS.name} compiles kernels, {env.FLASH_ATTN_WHEEL_MIRROR.name} names "
    "finished wheels."
)
Settings = Optional[dict[str, Any]]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    with telling():
        heed(config_settings)
        if is_of_parts(config_settings):
            return list(FOR_PARTS)
        wanted = [] if prebuilt.offers(install.builds_kernels()) else for_kernels()
    return [*build_meta.get_requires_for_build_wheel(config_settings), *wanted]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    with telling():
        heed(config_settings)
        check_that_no_wheel_is_asked_for()
        wanted = for_kernels()
    return [*build_meta.get_requires_for_build_editable(config_settings), *wanted]


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: Optional[str] = None,
) -> str:
    with telling():
        heed(config_settings)
        if is_of_parts(config_settings):
            from build_tools import assemble  # reads TOML, which other builds do without

            return assemble.universal(Path(wheel_directory), Path((config_settings or {})[PARTS]))
        name = prebuilt.obtain(Path(wheel_directory), install.builds_kernels())
        if name is not None:
            return name
        tell_of_no_kernels()
        with install.turn():
            return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: Optional[str] = None,
) -> str:
    with telling():
        heed(config_settings)
        check_that_no_wheel_is_asked_for()  # without isolation nobody asked what is required
        tell_of_no_kernels()
        with install.turn():
            return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def check_that_no_wheel_is_asked_for() -> None:
    if prebuilt.mode() == prebuilt.PREBUILT:
        raise ValueError(
            f"{env.FLASH_ATTN_BUILD.name}=prebuilt, but an editable install runs its own sources, "
            "and no wheel can stand in; unset it, or install without -e"
        )


def tell_of_no_kernels() -> None:
    """An announcement where none are compiled though nobody said so."""
    is_asked = env.FLASH_ATTENTION_SKIP_CUDA_BUILD.is_true()
    if not is_asked and not install.builds_kernels():
        announce(f"installing the package without kernels, which runs on CPU tensors. {WITH}")


def heed(config_settings: Settings) -> None:
    """Switches kernels off if a setting asks for that."""
    for name, value in (config_settings or {}).items():
        if name.lstrip("-") != SETTING:
            continue
        if str(value).lower() not in ("", "true", "1", "yes"):
            raise ValueError(f"the setting {name} is {value!r}; it must be true, or be left out")
        env.FLASH_ATTENTION_SKIP_CUDA_BUILD.set("TRUE")


def is_of_parts(config_settings: Settings) -> bool:
    return PARTS in (config_settings or {})


@contextmanager
def telling() -> Iterator[None]:
    """Ends the process with a message in place of a traceback, which would hide it."""
    try:
        yield
    except (ninja.BuildError, OptionError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


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
    if not any((folder / "torch" / "version.py").exists() for folder in package_folders()):
        torch = prebuilt.torch_here()
        # Without one to match, the newest there is, as the package itself will bring.
        wanted.append("torch=={}.{}.*".format(*torch.minor) if torch else "torch>=2.4")
    if wanted:
        log(f"kernels will be compiled, which needs {', '.join(wanted)}")
    return wanted
