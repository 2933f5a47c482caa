"""Where things stand, and the truth files, read by path: building imports no `flash_attn`."""

from __future__ import annotations

import importlib.util
import sys
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


support = truth("_support")
env = truth("_env")
