"""Where things stand, and the truth files, read by path: building imports no `flash_attn`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flash_attn"
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"
KERNELS = PACKAGE / "kernels"


def truth(name: str) -> ModuleType:
    """The truth file flash_attn/NAME.py, without importing the package around it."""
    key = f"build_tools.truth.{name}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, PACKAGE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"flash_attn/{name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def package_folders() -> list[Path]:
    """Where Python packages stand: those of this process, then those of the environment that a
    front end for isolated builds hides from it by variables such as PYTHONPATH.
    """
    command = [sys.executable, "-E", "-c", "import sys; print(*sys.path, sep='\\n')"]
    hidden = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    entries = dict.fromkeys([*sys.path, *hidden.splitlines()])
    return [Path(entry) for entry in entries if entry and Path(entry).is_dir()]


def activated_folders() -> list[Path]:
    """Where the packages of the activated environment stand.

    uv builds in an environment that knows nothing of the one it installs into; but if that one is
    activated, its programs still come next on the PATH.
    """
    for programs in map(Path, os.get_exec_path()):
        prefix = programs.parent
        is_environment = (prefix / "pyvenv.cfg").exists() or (prefix / "conda-meta").exists()
        if is_environment and prefix.resolve() != Path(sys.prefix).resolve():
            found = (*prefix.glob("lib/python3*/site-packages"), prefix / "Lib" / "site-packages")
            return [folder for folder in found if folder.is_dir()]
    return []


support = truth("_support")
env = truth("_env")
