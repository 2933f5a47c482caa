"""What a user gets: the sdist, the wheel, their metadata, and an import from a fresh place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from test_house import MAX_PATH, ROOT, project_files

from flash_attn import _env

# A torch that cannot be imported: building and reading metadata must not try.
BROKEN_TORCH = 'raise ImportError("the build imported torch")\n'
# Programs that a build without kernels has no use for; here they end it.
COMPILERS = ("c++", "clang++", "g++", "ninja", "nvcc")


class Dists(NamedTuple):
    """The two built files."""

    sdist: Path
    wheel: Path


def run(*command: str, cwd: Path, pythonpath: Path) -> str:
    """stdout of a Python command in a process of its own; a failure shows what it said."""
    child = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(pythonpath)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


@pytest.fixture(scope="module", autouse=True)
def _bare_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine without GPU and without compilers, where nothing is asked for."""
    tools = tmp_path_factory.mktemp("tools")
    for name in (*COMPILERS, "nvidia-smi"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} was called >&2\nexit 9\n", "utf-8")
        (tools / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for variable in _env.BUILD_VARIABLES:
            for name in (variable.name, *variable.aliases):
                patch.delenv(name, raising=False)
        patch.setenv("PATH", str(tools), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def broken_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "torch.py").write_text(BROKEN_TORCH, "utf-8")
    return folder


@pytest.fixture(scope="module")
def dists(tmp_path_factory: pytest.TempPathFactory, broken_torch: Path) -> Dists:
    """sdist of a clean copy of the tree, and the wheel built from that sdist, without torch."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in project_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    options = ("--no-isolation", "--outdir", str(out), str(source))
    run("-m", "build", *options, cwd=out, pythonpath=broken_torch)
    return Dists(*out.glob("*.tar.gz"), *out.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(dists: Dists) -> Message:
    with zipfile.ZipFile(dists.wheel) as wheel:
        return BytesParser().parsebytes(wheel.read("flash_attn-2.8.3.dist-info/METADATA"))


@pytest.fixture(scope="module")
def target(dists: Dists, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("target")
    pip_install(str(dists.wheel), folder, folder)
    return folder


def pip_install(what: str, target: Path, pythonpath: Path) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    command = ("-m", "pip", "install", *options, "--target", str(target), what)
    run(*command, cwd=target, pythonpath=pythonpath)


def test_files_are_named_as_published(dists: Dists) -> None:
    assert dists.sdist.name == "flash_attn-2.8.3.tar.gz"
    assert dists.wheel.name == "flash_attn-2.8.3-py3-none-any.whl"


def test_metadata_is_the_published_identity(metadata: Message) -> None:
    assert metadata["Name"] == "flash-attn"
    assert metadata["Version"] == "2.8.3"
    assert metadata["Requires-Python"] == ">=3.9"
    assert metadata["License-Expression"] == "BSD-3-Clause"


def test_runtime_requirements_are_torch_and_einops(metadata: Message) -> None:
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    runtime = {str(r) for r in requirements if r.marker is None}
    assert runtime == {"torch>=2.4", "einops"}
    assert metadata.get_all("Provides-Extra") == ["triton", "test", "dev"]


def test_metadata_is_static(dists: Dists) -> None:
    with tarfile.open(dists.sdist) as sdist:
        member = sdist.extractfile("flash_attn-2.8.3/PKG-INFO")
        assert member is not None
        dynamic = BytesParser().parsebytes(member.read()).get_all("Dynamic", [])
    assert [field for field in dynamic if field.lower() != "license-file"] == []


def test_sdist_holds_every_source_under_short_paths(dists: Dists) -> None:
    with tarfile.open(dists.sdist) as sdist:
        names = sdist.getnames()
    top = "flash_attn-2.8.3"
    folders = ("benchmarks", "build_tools", "csrc", "docs", "flash_attn", "tests", "tools")
    wanted = [path.as_posix() for path in project_files() if path.parts[0] in folders]
    wanted += ["CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"]
    assert [name for name in wanted if f"{top}/{name}" not in names] == []
    assert [name for name in names if len(name) > MAX_PATH] == []


def test_wheel_holds_every_module_and_nothing_else(dists: Dists) -> None:
    with zipfile.ZipFile(dists.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        infos = {name.split("/", 1)[1] for name in wheel.namelist() if ".dist-info/" in name}
    files = [path.as_posix() for path in project_files()]
    package = {name for name in files if name.startswith(("flash_attn/", "flash_attn_3/"))}
    assert names == package | {"flash_attn_2_cuda.py", "flash_attn_interface.py"}
    assert "licenses/LICENSE" in infos
    assert max(map(len, names)) <= MAX_PATH


@pytest.mark.parametrize("kind", ["tree", "sdist"])
def test_source_installs_without_build_isolation(
    kind: str, dists: Dists, broken_torch: Path, tmp_path: Path
) -> None:
    with tarfile.open(dists.sdist) as sdist:
        sdist.extractall(tmp_path, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    what = tmp_path / "flash_attn-2.8.3" if kind == "tree" else dists.sdist
    target = tmp_path / "target"
    target.mkdir()
    pip_install(str(what), target, broken_torch)
    assert (target / "flash_attn" / "__init__.py").exists()
    assert (target / "flash_attn_2_cuda.py").exists()


def test_fresh_install_imports_and_runs_without_touching_a_gpu(target: Path) -> None:
    program = """
import importlib.metadata, pathlib, torch
import flash_attn, flash_attn_2_cuda, flash_attn_interface
here = pathlib.Path.cwd()
modules = (flash_attn, flash_attn_2_cuda, flash_attn_interface)
assert all(here in pathlib.Path(m.__file__).parents for m in modules), modules
assert flash_attn.__version__ == importlib.metadata.version("flash-attn") == "2.8.3"
assert not torch.cuda.is_initialized()
q = torch.randn(1, 5, 2, 8)
print(tuple(flash_attn.flash_attn_func(q, q, q).shape))
"""
    assert run("-c", program, cwd=target, pythonpath=target) == "(1, 5, 2, 8)\n"


@pytest.mark.parametrize("words", [("-m", "flash_attn"), ("-c", "import flash_attn")])
def test_a_missing_torch_is_told_with_the_remedy(target: Path, words: tuple[str, str]) -> None:
    # -S: nothing but the standard library and the package.
    child = subprocess.run(
        [sys.executable, "-S", *words], cwd=target, capture_output=True, text=True, check=False
    )
    assert child.returncode == 1
    told = child.stderr.splitlines()
    remedy = "flash_attn needs torch 2.4 or later, which is not installed: `pip install torch`"
    assert remedy in told[-1]
    assert len(told) == 1 or "-c" in words


def test_consumers_find_the_distribution_behind_the_module(target: Path) -> None:
    program = """
import importlib.metadata as m
print(set(m.packages_distributions()["flash_attn"]))
"""
    if sys.version_info < (3, 10):
        pytest.skip("importlib.metadata.packages_distributions is new in Python 3.10")
    assert run("-c", program, cwd=target, pythonpath=target) == "{'flash-attn'}\n"
