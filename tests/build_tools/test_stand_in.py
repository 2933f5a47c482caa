"""The wheel by which programs find FlashAttention-3's distribution here."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fresh_venv import Environment, Installer

from build_tools import __main__ as build_tools
from build_tools import stand_in


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    assert build_tools.main(["stand-in", "--to", str(folder / "new")]) == 0
    (file,) = (folder / "new").iterdir()
    return file


def test_it_has_no_files_but_its_metadata(wheel: Path) -> None:
    assert wheel.name == "flash_attn_3-3.0.0-py3-none-any.whl"
    assert wheel.read_bytes() == stand_in.wheel()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("flash_attn_3-3.0.0.dist-info/METADATA").decode().splitlines()
    assert {name.split("/")[0] for name in names} == {"flash_attn_3-3.0.0.dist-info"}
    assert "Requires-Dist: flash-attn==2.8.3" in metadata


ASKS = """
import importlib.metadata, json
modules = importlib.metadata.packages_distributions()
print(json.dumps([importlib.metadata.version(name) for name in ("flash-attn-3", "flash_attn_3")]
                 + [modules.get(name) for name in ("flash_attn_3", "flash_attn_interface")]))
"""


@pytest.mark.skipif(sys.version_info < (3, 10), reason="packages_distributions is of 3.10")
def test_installed_it_is_found_by_either_name(wheel: Path, tmp_path: Path) -> None:
    env = Environment(tmp_path / "env")
    status, said = Installer("pip", tmp_path).run(env, wheel, "--no-deps")
    assert status == 0, said
    command = [env.python, "-c", ASKS]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == ["3.0.0"] * 2 + [["flash_attn_3"]] * 2
