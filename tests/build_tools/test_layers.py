"""The layers of csrc: who may include whom, as docs/architecture.md draws them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from native_tools import ROOT

from build_tools.paths import env

CSRC = ROOT / "csrc"
# What the files of a folder may include, besides their own folder's.
ALLOWED: dict[str, tuple[str, ...]] = {
    "device/ptx": ("host/flash.h",),
    "device/tile": ("host/flash.h", "ptx"),
    "device/attn": ("host/flash.h", "ptx", "tile"),
    "device/common": ("host/flash.h", "ptx", "tile", "attn"),
    "device/sm80": ("host/flash.h", "ptx", "tile", "attn", "device/common/arch.h"),
    "device/sm90": ("host/flash.h", "ptx", "tile", "attn"),
    "device/decode": ("host/flash.h", "ptx", "tile", "attn", "device/common/arch.h"),
    "host": tuple(f"device/{family}/config.h" for family in ("sm80", "sm90", "decode", "common")),
    "torch": ("host/api.h", "host/flash.h"),
}
FILES = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh", ".cpp")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_a_file_includes_only_layers_below(path: Path) -> None:
    folder = path.parent.relative_to(CSRC).as_posix()
    own = folder.replace("device/", "")
    allowed = (own, *ALLOWED[folder])
    quoted = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text("utf-8"), re.MULTILINE)
    outside = [x for x in quoted if x not in allowed and x.rsplit("/", 1)[0] not in allowed]
    assert outside == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_the_host_library_speaks_portable_c_plus_plus() -> None:
    # `long` has 64 bits here and 32 on Windows.
    for path in (CSRC / "host").iterdir():
        code = re.sub(r'//.*|"(?:\\.|[^"\\])*"', "", path.read_text("utf-8"))
        assert re.findall(r"(?<!long )\blong\b(?! long)", code) == [], path
        assert "__builtin_" not in code, path


def test_every_build_variable_is_documented() -> None:
    text = (ROOT / "docs/building.md").read_text("utf-8")
    names = [name for v in env.BUILD_VARIABLES for name in (v.name, *v.aliases)]
    assert [name for name in names if f"`{name}`" not in text] == []
