"""What is picked when the package is imported, and what a person reads where nothing fits."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native_tools import Stub, lay_out_kernels, native, needs

from flash_attn import backends, info
from flash_attn._problem import Problem
from flash_attn.backends import cuda, triton

HOPPER = Problem("cuda", "bfloat16", 64, 64, frozenset({"causal"}), (9, 0))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty installation under torch 2.7.1 with the old C++ ABI, without Triton."""
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cuda, "_PACKAGE", tmp_path)
    monkeypatch.setattr(cuda, "_HOST_LIBRARY", tmp_path / native.HOST_LIBRARY)
    monkeypatch.setattr(cuda, "_KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(cuda.torch, "__version__", "2.7.1")
    monkeypatch.setattr(cuda.torch, "compiled_with_cxx11_abi", lambda: False)
    return tmp_path


@pytest.mark.parametrize(
    ("version", "cxx11_abi", "file"),
    [
        ("2.4.1", False, "_shim_torch2_4_cxx11abiFALSE.so"),
        ("2.9.1+cu128", True, "_shim_torch2_9_cxx11abiTRUE.so"),
        ("2.10.0", True, "_shim_stable.so"),
        ("2.13.0+cpu", True, "_shim_stable.so"),
        ("2.16.0a0+git1234", True, "_shim_stable.so"),
        ("3.0.0", True, "_shim_stable.so"),
    ],
)
def test_the_shim_is_picked_by_torch_and_its_abi(version: str, cxx11_abi: bool, file: str) -> None:
    assert cuda.shim_file(version, cxx11_abi).name == file
    # What builds them names them alike.
    numbers = tuple(int(word) for word in version.split(".")[:2])
    assert native.shim_file(numbers, cxx11_abi) == file


@pytest.mark.parametrize(
    ("shims", "words"),
    [
        ("stable", "2.10 and later"),
        ("torch2_8_cxx11abiTRUE", "2.8 (cxx11abi TRUE)"),
        ("torch2_9_cxx11abiTRUE torch2_8_cxx11abiTRUE torch2_8_cxx11abiFALSE stable",
         "2.8, 2.9 (cxx11abi TRUE), 2.10 and later"),
    ],
)  # fmt: skip
def test_an_installation_tells_which_torches_it_is_for(
    package: Path, shims: str, words: str
) -> None:
    for name in shims.split():
        (package / f"_shim_{name}.so").touch()
    assert cuda._load() == (
        None,
        f"this installation has kernels for torch {words}, not for torch 2.7.1 with cxx11abi FALSE",
        "",
    )


def test_the_package_alone_says_that_it_has_no_kernels(package: Path) -> None:
    assert cuda._load()[1] == "this installation has no compiled kernels for torch 2.7.1"


def compile_library(file: Path, text: str = "", *options: str) -> None:
    source = file.with_suffix(".cpp")
    source.write_text(text, "utf-8")
    command = [needs("g++"), "-shared", "-fPIC", str(source), "-o", str(file), *options]
    subprocess.run(command, check=True)


def break_nothing_of_host(stub: Stub, shim: Path) -> None:
    shutil.copyfile(stub.host, shim.with_name(stub.host.name))


def no_host(stub: Stub, shim: Path) -> None:
    shim.touch()


def host_for_another_machine(stub: Stub, shim: Path) -> None:
    shim.touch()
    data = bytearray(stub.host.read_bytes())
    data[18] = 0xF3  # RISC-V
    shim.with_name(stub.host.name).write_bytes(data)


def empty_shim(stub: Stub, shim: Path) -> None:
    break_nothing_of_host(stub, shim)
    shim.touch()


def shim_with_a_symbol_that_nobody_has(stub: Stub, shim: Path) -> None:
    break_nothing_of_host(stub, shim)
    text = 'extern "C" int torch_absent(); extern "C" int flash_attn_serve = torch_absent();'
    compile_library(shim, text, "-Wl,-z,now")


def shim_of_another_version(stub: Stub, shim: Path) -> None:
    break_nothing_of_host(stub, shim)
    compile_library(shim, 'extern "C" int flash_attn_serve() { return 0; }')


OTHER = "is made for another system than "


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_host, f"this installation is damaged: {native.HOST_LIBRARY} is missing"),
        (host_for_another_machine, f"{native.HOST_LIBRARY} {OTHER}"),
        (empty_shim, f"_shim_torch2_7_cxx11abiFALSE.so {OTHER}"),
        (shim_with_a_symbol_that_nobody_has, "another build of torch than 2.7.1, or damaged"),
        (shim_of_another_version, "cxx11abiFALSE.so is of another version of this package"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_library_that_does_not_load_is_told_in_a_sentence(
    package: Path, stub: Stub, spoil: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(spoil)
    spoil(stub, cuda.shim_file("2.7.1", False))
    host, why, said = cuda._load()
    assert host is None
    assert words in why
    assert str(package) not in why
    assert "\n" not in why
    for name, value in (("_HOST", host), ("_WHY_NOT_LOADED", why), ("LOADER_SAID", said)):
        monkeypatch.setattr(cuda, name, value)
    with pytest.raises(RuntimeError) as caught:
        backends.choose(HOPPER)
    message = str(caught.value)
    assert f"  cuda: {why}\n" in message
    assert cuda.REMEDY in message
    for loaders in ("cannot open shared object", "undefined symbol", "file too short"):
        assert loaders not in message
    # The report for people who look closer has the system's words.
    assert [line for line in info.advice() if said and said in line] == [
        f"The system's loader said of the CUDA backend: {said}"
    ] * bool(said)


def no_kernels(package: Path) -> None:
    shutil.rmtree(package / "kernels")


def empty_table(package: Path) -> None:
    (package / "kernels" / "index.txt").write_text("", "utf-8")


def host_gone(package: Path) -> None:
    (package / native.HOST_LIBRARY).unlink()


def shim_for_another_torch(package: Path) -> None:
    cuda.shim_file("2.7.1", False).rename(package / "_shim_stable.so")


def nothing_compiled(package: Path) -> None:
    for file in (*package.glob("*.so"), package / "kernels"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(
            None,
            "for 80, 90, 90a, 80+ptx; torch 2.7 (cxx11abi FALSE)",
            marks=pytest.mark.skipif(cuda._HOST is not None, reason="a process opens kernels once"),
        ),
        (no_kernels, "none: the compiled kernels cannot be used: "),
        (empty_table, "none: the compiled kernels cannot be used: "),
        (host_gone, f"none: this installation is damaged: {native.HOST_LIBRARY} is missing"),
        (shim_for_another_torch, "none: this installation has kernels for torch 2.10 and later, "),
        (nothing_compiled, "none: this installation has no compiled kernels for torch 2.7.1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_installed_is_told_without_a_gpu(
    package: Path, stub: Stub, spoil: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = cuda.shim_file("2.7.1", False)
    break_nothing_of_host(stub, shim)
    lay_out_kernels(package / "kernels", ("80", "90a", "80+ptx", "90"))
    # What csrc/torch has of this function, less the operators.
    text = (
        'extern "C" int flash_open(const char*); extern "C" const char* flash_last_error();'
        'extern "C" const char* flash_attn_serve(const char* folder, int) {'
        "  return flash_open(folder) ? nullptr : flash_last_error(); }"
        'extern "C" const char* flash_attn_stop_serving() { return nullptr; }'
    )
    compile_library(shim, text, str(package / native.HOST_LIBRARY))
    if callable(spoil):
        spoil(package)
    host, why, said = cuda._load()
    for name, value in (("_HOST", host), ("_WHY_NOT_LOADED", why), ("LOADER_SAID", said)):
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(info, "devices", lambda: [info.Device("cpu", "a CPU")])
    row = info.versions()["CUDA kernels"]
    assert row is not None
    assert row.startswith(words)
    is_well = spoil in (None, nothing_compiled)
    advice = [line for line in info.advice() if line.startswith("CUDA kernels: ")]
    assert advice == ([] if is_well else [f"CUDA kernels: {row}. Remedy: {cuda.REMEDY}."])


def test_a_device_without_kernels_is_told_with_the_remedy(
    package: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_nothing_of_host(stub, package / "shim")
    lay_out_kernels(package / "kernels", ("80",))
    host = cuda._open(package / native.HOST_LIBRARY, "system")
    host.flash_last_error.restype = ctypes.c_char_p
    host.flash_open(str(package / "kernels").encode())
    monkeypatch.setattr(cuda, "_HOST", host)
    reasons = cuda.why_not(HOPPER)
    assert len(reasons) == 1
    assert "was built for 8.0" in reasons[0]
    gpu = info.Device("cuda:0", "Hopper, cc 9.0", (9, 0))
    monkeypatch.setattr(info, "devices", lambda: [gpu])
    pattern = r"cuda:0 \(Hopper, cc 9\.0\) is not served: cuda: no delta kernel .* built for 8\.0"
    assert re.match(pattern, info.advice()[0])
    assert f"Remedy: {cuda.REMEDY}, or {triton.REMEDY}." in info.advice()[0]
