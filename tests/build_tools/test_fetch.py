"""What parts are made with: fetched once, whole or not at all, and cut down to what is needed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from native_tools import native, needs

from build_tools import fetch, ninja
from build_tools.matrix_facts import load

FACTS = load()
X86_64 = FACTS.platform["linux_x86_64"]
OLD_ABI = "_ZN3c106detail14torchCheckFailEPKcS2_jRKSs"


def library(folder: Path, symbol: str) -> bytes:
    file = folder / "library.so"
    text = f'extern "C" void {symbol}() {{}}'
    source = folder / "library.cpp"
    source.write_text(text, "utf-8")
    options = ["-shared", "-fPIC", "-nostdlib", str(source), "-o", str(file)]
    subprocess.run([needs("g++"), *options], check=True)
    return file.read_bytes()


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], list[str]]:
    """Stands for pip: leaves a wheel with these files where it is told to, and notes how."""
    monkeypatch.setattr(fetch, "FETCHED", tmp_path / "fetched")

    def ready(files: dict[str, bytes]) -> list[str]:
        calls: list[str] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            calls.append(" ".join(command))
            dest = next(x.partition("=")[2] for x in command if x.startswith("--dest="))
            if files:
                Path(dest).mkdir()
                with zipfile.ZipFile(Path(dest, "package.whl"), "w") as wheel:
                    for name, data in files.items():
                        wheel.writestr(name, data)
            return subprocess.CompletedProcess(command, 0 if files else 1, "", "no such release")

        monkeypatch.setattr(fetch.subprocess, "run", run)
        return calls

    return ready


def test_of_a_torch_headers_and_exports_stay(
    tmp_path: Path, pip: Callable[[dict[str, bytes]], list[str]]
) -> None:
    files = {
        "torch/include/ATen/ATen.h": b"// a header\n",
        "torch/lib/libtorch_cpu.so": library(tmp_path, "aoti_torch_empty"),
        "torch/lib/libc10.so": library(tmp_path, OLD_ABI),
        "torch/lib/libtorch_python.so": b"not needed",
        "torch/version.py": b"",
    }
    calls = pip(files)
    headers = fetch.torch_headers("2.4.1", X86_64)
    assert (headers / "ATen" / "ATen.h").read_bytes() == b"// a header\n"
    found = fetch.torch_libraries("2.4.1", X86_64)
    assert found.exports == {"aoti_torch_empty", OLD_ABI}
    assert (found.minor, found.cxx11abi, found.has_cuda) == ("2.4", "FALSE", False)
    assert str(found) == "torch 2.4.1 for linux_x86_64"
    kept = {x.name for x in headers.parent.rglob("*") if x.is_file()}
    assert kept == {"ATen.h", fetch.EXPORTS}
    assert len(calls) == 1
    assert "--platform=manylinux_2_28_x86_64" in calls[0]
    assert calls[0].endswith(" torch==2.4.1")
    assert [str(x) for x in fetch.fetched_torches(X86_64)] == [str(found)]


def test_the_compiler_is_fetched_once_with_its_builtins(
    pip: Callable[[dict[str, bytes]], list[str]],
) -> None:
    names = ("libnvrtc.so.12", "libnvrtc.alt.so.12", "libnvrtc-builtins.so.12.8")
    calls = pip({f"nvidia/cuda_nvrtc/lib/{name}": b"" for name in names})
    cuda = FACTS.cuda["12"]
    library = fetch.nvrtc(cuda)
    assert library.name == "libnvrtc.so.12"
    assert {path.name for path in library.parent.iterdir()} == set(names)
    assert fetch.nvrtc(cuda) == library
    assert len(calls) == 1
    assert calls[0].endswith(f" {cuda.nvrtc}")


def test_a_download_that_fails_is_told_and_leaves_nothing(
    pip: Callable[[dict[str, bytes]], list[str]],
) -> None:
    pip({})
    with pytest.raises(ninja.BuildError, match=r"(?s)torch==2.6.0 cannot be downloaded.*no such"):
        fetch.torch_headers("2.6.0", X86_64)
    assert list(fetch.FETCHED.iterdir()) == []


def test_the_torch_of_a_python_is_read() -> None:
    found, here = fetch.installed_torch(sys.executable), native.find_torch()
    assert found.minor == "{}.{}".format(*here.version)
    assert found.cxx11abi == str(here.cxx11_abi).upper()
    assert "aoti_torch_delete_tensor_object" in found.exports
    with pytest.raises(ninja.BuildError, match="has no torch, whose libraries are asked for"):
        fetch.installed_torch("/bin/false")
