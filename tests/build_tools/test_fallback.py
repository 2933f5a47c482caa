"""Installing a source archive: which wheel stands in, for whom, and what else is done."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fresh_venv import (
    NAMES,
)
from native_tools import ROOT
from stand_ins import UNIVERSAL, make_mirror, make_wheel

from build_tools import arch, backend, choose_wheel, install, manifest, mirror, native, prebuilt
from build_tools.arch import Arch
from build_tools.choose_wheel import Here, TorchHere
from build_tools.manifest import Entry
from build_tools.ninja import BuildError
from build_tools.paths import env

MANY = "flash-attn/flash_attn-2.8.3-py3-none-manylinux_2_28_x86_64.whl"
FOR_28, FOR_29 = f"whl/cu12/torch2.8/{MANY}", f"whl/cu13/torch2.9/{MANY}"
SLIM = f"whl/cu12/torch2.8/sm90/{MANY}"
WINDOWS = "whl/flash-attn/flash_attn-2.8.3-py3-none-win_amd64.whl"
PURE = "whl/flash-attn/flash_attn-2.8.3-py3-none-any.whl"
PUBLISHED = (
    "whl/cu12/flash-attn/flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"
)
HERE = Here("2.8.3", "3.12", "linux_x86_64", (2, 31), TorchHere("2.8.0+cu128", "12.8"))
H100 = (Arch(90),)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with a wheel of each kind."""
    wheels = {UNIVERSAL: "", WINDOWS: "", FOR_28: "2.8", FOR_29: "2.9", PUBLISHED: "2.8"}
    folder = tmp_path_factory.mktemp("mirror")
    make_wheel(folder / "dist", SLIM, "2.8", archs=("90",))
    make_wheel(folder / "dist", PURE, archs=())
    return make_mirror(folder, wheels)


@pytest.fixture(scope="module")
def known(made: Path) -> dict[str, Entry]:
    return mirror.read_manifest(made)


# Which wheel


@pytest.mark.parametrize(
    ("wanted", "best"),
    [
        (HERE, UNIVERSAL),
        (replace(HERE, gpus=H100), UNIVERSAL),
        (replace(HERE, gpus=(Arch(86), Arch(103))), UNIVERSAL),
        (replace(HERE, torch=None), UNIVERSAL),
        (replace(HERE, torch=TorchHere("2.15.0", "13.2")), UNIVERSAL),
        (replace(HERE, torch=TorchHere("2.4.1+cpu", None)), UNIVERSAL),
        (replace(HERE, python="3.15t"), UNIVERSAL),
        (replace(HERE, platform="win_amd64", glibc=None), WINDOWS),
        (replace(HERE, torch=TorchHere("2.8.0+cu118", "11.8")), None),
        (replace(HERE, torch=TorchHere("2.3.1", "12.1")), None),
        (replace(HERE, torch=TorchHere("3.0.0", "13.0")), None),
        (replace(HERE, glibc=(2, 27)), None),
        (replace(HERE, glibc=None), None),
        (replace(HERE, platform="macosx_14_0_arm64", glibc=None), None),
        (replace(HERE, gpus=(Arch(75),)), None),
        (replace(HERE, version="2.8.4"), None),
    ],
)
def test_the_best_wheel_serves_every_torch(
    known: dict[str, Entry], wanted: Here, best: str | None
) -> None:
    chosen = choose_wheel.choose(known.values(), wanted)
    assert (chosen.best.path if chosen.best else None) == best
    assert len(chosen.against) == len(known) - len(chosen.bound) - bool(best)


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ({"gpus": (Arch(100),)}, SLIM, "has kernels for 90, none that run on 100"),
        ({}, PURE, "has no kernels"),
        ({}, WINDOWS, "for win_amd64"),
        ({"glibc": (2, 17)}, UNIVERSAL, "needs glibc 2.28; here it is 2.17"),
        ({"glibc": None}, UNIVERSAL, "needs glibc, which is not the C library here"),
        ({"python": "3.13t"}, PUBLISHED, "for Python cp312-cp312-linux_x86_64"),
        ({}, FOR_29, "for torch 2.9"),
        ({"torch": None}, FOR_29, "for torch 2.9; none is found here"),
        ({"torch": TorchHere("2.3.0", "12.1")}, UNIVERSAL, "for torch 2.4 and later 2.x"),
        (
            {"torch": TorchHere("2.8.0", "11.8")},
            UNIVERSAL,
            "for CUDA 12 and 13; torch here is for 11.8",
        ),
        ({}, PUBLISHED, "version 2.8.3+cu12torch2.8cxx11abiTRUE; these sources are 2.8.3"),
    ],
)
def test_what_speaks_against_a_wheel_is_told(
    known: dict[str, Entry], change: dict[str, object], path: str, reason: str
) -> None:
    assert reason in choose_wheel.reasons(known[path], replace(HERE, **change))  # type: ignore[arg-type]


def test_the_nearest_wheels_are_told_first(known: dict[str, Entry]) -> None:
    wanted = replace(HERE, torch=TorchHere("2.10.0", "13.0"), gpus=(Arch(75),))
    told = choose_wheel.choose(known.values(), wanted).against
    assert told[0].startswith(UNIVERSAL)
    differences = [line.count(";") for line in told]
    assert told[-1].count(";") == max(differences)


# What is asked for


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The hooks of the backend, on a machine without a GPU, in a source archive."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "PKG-INFO").touch()
    monkeypatch.setattr(prebuilt, "ROOT", tmp_path)
    monkeypatch.setattr(arch, "local_gpus", list)
    monkeypatch.setattr(prebuilt, "torch_here", lambda: HERE.torch)
    # setuptools would answer from this checkout, and leave its notes there.
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: [])
    monkeypatch.setattr(prebuilt, "offers", prebuilt.offers.__wrapped__)
    monkeypatch.setattr(install, "builds_kernels", install.builds_kernels.__wrapped__)
    return monkeypatch


@pytest.mark.parametrize(
    ("settings", "is_sought"),
    [
        ("", False),
        ("FLASH_ATTN_WHEEL_MIRROR=x", True),
        ("FLASH_ATTN_WHEEL_MIRROR=x FLASH_ATTN_BUILD=source", False),
        ("FLASH_ATTN_WHEEL_MIRROR=x FLASH_ATTENTION_FORCE_BUILD=TRUE", False),
        ("FLASH_ATTN_WHEEL_MIRROR=x FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE", False),
        ("FLASH_ATTN_WHEEL_MIRROR=x FLASH_ATTN_CUDA_ARCHS=90", True),
        ("FLASH_ATTN_BUILD=prebuilt", True),
        ("FLASH_ATTN_BUILD=prebuilt FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE", False),
        ("FLASH_ATTN_BUILD=auto", False),
    ],
)
def test_mirrors_are_asked_where_the_environment_says_so(
    decide: pytest.MonkeyPatch, settings: str, is_sought: bool
) -> None:
    for setting in settings.split():
        decide.setenv(*setting.split("=", 1))
    assert prebuilt.is_sought() is is_sought


def test_changed_sources_are_not_answered_with_a_wheel_of_others(
    decide: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", str(tmp_path))
    (tmp_path / "PKG-INFO").unlink()
    assert not prebuilt.is_sought()
    assert "FLASH_ATTN_BUILD=prebuilt asks it" in capsys.readouterr().err
    decide.setenv("FLASH_ATTN_BUILD", "prebuilt")
    assert prebuilt.is_sought()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("FLASH_ATTN_BUILD=never", "is set to 'never'; it must be auto or prebuilt or source"),
        ("FLASH_ATTN_BUILD=prebuilt", "needs FLASH_ATTN_WHEEL_MIRROR: an address or a folder"),
        ("FLASH_ATTN_BUILD=prebuilt FLASH_ATTENTION_FORCE_BUILD=TRUE", "contradict each other"),
        ("FLASH_ATTN_WHEEL_MIRROR=http://example.org", "plain HTTP can be changed by anybody"),
        ("FLASH_ATTN_WHEEL_MIRROR=ftp://example.org", "must be https, file: or a folder, not ftp"),
        ("FLASH_ATTN_WHEEL_MIRROR=mir", "mir: a folder must be absolute"),
        ("FLASH_ATTN_WHEEL_MIRROR=file:mir", "file:mir: a folder must be absolute"),
    ],
)
def test_a_wrong_setting_ends_the_installation(
    decide: pytest.MonkeyPatch, settings: str, message: str
) -> None:
    for setting in settings.split():
        decide.setenv(*setting.split("=", 1))
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        backend.get_requires_for_build_wheel()
    assert str(error.value).startswith("error: ")


def test_the_first_mirror_that_has_the_wheel_gives_it(
    decide: pytest.MonkeyPatch, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    mirror.mirror(str(made), broken)
    (broken / UNIVERSAL).unlink()
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", f"{tmp_path / 'none'}, {broken} {made}")
    assert backend.get_requires_for_build_wheel() == []
    assert backend.build_wheel(str(tmp_path)) == Path(UNIVERSAL).name
    assert (tmp_path / Path(UNIVERSAL).name).read_bytes() == (made / UNIVERSAL).read_bytes()
    told = capsys.readouterr().err
    assert "left out" in told
    assert str(tmp_path / "none") in told


NAME = Path(UNIVERSAL).name


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("", b"{", b"\x93\xff", "wheels.json is no JSON: 'utf-8' codec"),
        ("", b"{", b"[" * 200_000, "while decoding a JSON"),
        ("", b'"120"', b'"hopper"', "'hopper' is no CUDA architecture"),
        ("", b'"torch": "2.8"', b'"torch": "main"', "is for torch 'main', no version"),
        ("", NAME.encode(), NAME.replace("-py3", "-0torch2.8-py3").encode(), "is no wheel of"),
        ("https://me:word@[::1", b"", b"", "https://[::1 is no address: Invalid IPv6 URL"),
        ("~nobody-of-this-name/mir", b"", b"", "determine home directory"),
    ],
)
def test_a_strange_mirror_is_left_out_and_told(
    decide: pytest.MonkeyPatch,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    old: bytes,
    new: bytes,
    reason: str,
) -> None:
    text = (made / manifest.FILE).read_bytes()
    assert old in text
    (tmp_path / manifest.FILE).write_bytes(text.replace(old, new))
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", f"{name or tmp_path} {made}")
    assert [m.base for m in prebuilt.offers(False)] == [f"{made.as_uri()}/"]
    told = capsys.readouterr().err
    assert f"left out: {name.replace('me:word@', '') or tmp_path}: " in told
    assert reason in told


@pytest.mark.parametrize(
    ("archs", "served"),
    [("7.5 8.0 9.0+PTX", [80, 90, 90]), ("all", []), ("90a", [90])],
)
def test_wheels_are_asked_for_the_gpus_that_are_named(
    decide: pytest.MonkeyPatch, made: Path, archs: str, served: list[int]
) -> None:
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", str(made))
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", archs)
    assert [gpu.number for gpu in prebuilt.environment().gpus] == served
    if sys.platform.startswith("linux"):
        assert prebuilt.offers(False)


def test_gpus_that_no_kernel_serves_are_refused(decide: pytest.MonkeyPatch, made: Path) -> None:
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", str(made))
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", "7.5")
    with pytest.raises(BuildError, match=r"no kernel runs on 7\.5"):
        prebuilt.offers(True)
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", "hoper")
    with pytest.raises(ValueError, match="FLASH_ATTN_CUDA_ARCHS is set to 'hoper'"):
        prebuilt.offers(True)


def test_windows_takes_wheels_for_the_gpus_that_are_named(
    decide: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> None:
    decide.setattr(install.sys, "platform", "win32")
    decide.setattr(choose_wheel.sysconfig, "get_platform", lambda: "win-amd64")
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", str(made))
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", "9.0")
    assert backend.build_wheel(str(tmp_path)) == Path(WINDOWS).name


def test_sources_that_know_their_wheels_take_no_other(
    decide: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> None:
    """Even one that fits its mirror's own manifest."""
    forged = tmp_path / "forged"
    make_wheel(tmp_path / "dist", text="forged")
    mirror.mirror(str(tmp_path / "dist"), forged)
    decide.setattr(prebuilt, "KNOWN", made / manifest.FILE)
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", str(forged))
    with pytest.raises(SystemExit, match="the mirrors have none at all"):
        backend.build_wheel(str(tmp_path))
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", f"{forged},{made}")
    assert backend.build_wheel(str(tmp_path)) == Path(UNIVERSAL).name
    assert manifest.sha256(tmp_path / Path(UNIVERSAL).name) == manifest.sha256(made / UNIVERSAL)


def test_where_no_wheel_fits_kernels_are_compiled_and_that_is_announced(
    decide: pytest.MonkeyPatch, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decide.setattr(prebuilt, "torch_here", lambda: TorchHere("2.8.0", "11.8"))
    decide.setattr(backend, "for_kernels", lambda: ["a compiler"])
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", str(made))
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", "90")
    assert backend.get_requires_for_build_wheel() == ["a compiler"]
    assert "torch here is for 11.8" in capsys.readouterr().err
    steps = []
    decide.setattr(install, "announce", lambda line: steps.append(line))
    decide.setattr(install, "make", lambda folder: steps.append("compiled"))
    decide.setattr(install, "place", lambda made, package: None)
    decide.setattr(install, "torch_here", lambda: native.Torch((2, 8), tmp_path, tmp_path, True))
    command = install.BuildNative.__new__(install.BuildNative)
    command.build_lib, command.editable_mode = str(tmp_path), False
    command.run()
    assert steps[0].startswith("compiling CUDA kernels for 90.")
    assert steps[1] == "compiled"
    assert "serves torch 2.8 alone" in steps[2]


def test_an_announcement_reaches_the_terminal_of_an_installer_that_hides_it() -> None:
    # A session without a terminal gets the first one that it opens.
    program = """
import os, subprocess, sys
os.open(sys.argv[1], os.O_RDWR)
said = "from build_tools.messages import announce; announce('it compiles')"
child = subprocess.run([sys.executable, "-c", said], capture_output=True)
assert b"flash-attn: it compiles" in child.stderr
"""
    terminal, name = os.openpty()
    try:
        command = [sys.executable, "-c", program, os.ttyname(name)]
        subprocess.run(command, cwd=ROOT, start_new_session=True, check=True)
        assert b"flash-attn: it compiles\r" in os.read(terminal, 1000)
    finally:
        os.close(terminal)
        os.close(name)


def test_the_cxx11_abi_can_be_forced(decide: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = native.Torch((2, 5), tmp_path, tmp_path, cxx11_abi=False)
    decide.setattr(native, "find_torch", lambda: found)
    decide.setattr(install, "torch_here", install.torch_here.__wrapped__)
    assert native.shim_name(install.torch_here()).endswith("cxx11abiFALSE.so")
    decide.setenv("FLASH_ATTENTION_FORCE_CXX11_ABI", "TRUE")
    assert native.shim_name(install.torch_here()).endswith("cxx11abiTRUE.so")


def test_an_isolated_compile_asks_for_the_torch_of_the_activated_environment(
    decide: pytest.MonkeyPatch,
) -> None:
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", "90")
    decide.setattr(backend, "package_folders", list)
    assert "torch==2.8.*" in backend.for_kernels()
    decide.setattr(prebuilt, "torch_here", lambda: None)
    assert "torch>=2.4" in backend.for_kernels()


@pytest.mark.parametrize("settings", [{"no-cuda-extensions": "1"}, {"--no-cuda-extensions": ""}])
def test_a_setting_switches_kernels_off(
    decide: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", "90")
    decide.setenv("FLASH_ATTENTION_SKIP_CUDA_BUILD", "")  # so that it is put back
    assert install.builds_kernels()
    backend.heed(settings)
    assert not install.builds_kernels()
    with pytest.raises(ValueError, match="no-cuda-extensions is 'no'; it must be true"):
        backend.heed({"no-cuda-extensions": "no"})


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_a_build_without_kernels_is_announced_unless_it_was_asked_for(
    decide: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hook: str
) -> None:
    decide.setattr(backend.build_meta, hook, lambda *arguments: "name")
    assert getattr(backend, hook)("") == "name"
    assert "installing the package without kernels" in capsys.readouterr().err
    decide.setenv("FLASH_ATTENTION_SKIP_CUDA_BUILD", "")  # so that it is put back
    decide.setenv("FLASH_ATTN_BUILD", "prebuilt")
    assert getattr(backend, hook)("", {"no-cuda-extensions": "true"}) == "name"
    assert capsys.readouterr().err == ""


def test_a_checkout_can_take_a_wheel_too(decide: pytest.MonkeyPatch, made: Path) -> None:
    decide.setenv("FLASH_ATTN_BUILD", "prebuilt")
    decide.setenv("FLASH_ATTN_WHEEL_MIRROR", made.as_uri())
    assert [m.choice.best.path for m in prebuilt.offers(False) if m.choice.best] == [UNIVERSAL]
    for hook in (backend.get_requires_for_build_editable, lambda: backend.build_editable("")):
        with pytest.raises(SystemExit, match="no wheel can stand in"):
            hook()
    decide.setattr(prebuilt, "torch_here", lambda: TorchHere("2.2.0", "12.1"))
    with pytest.raises(BuildError, match="FLASH_ATTN_BUILD=source compiles instead"):
        prebuilt.offers(False)
    assert env.FLASH_ATTN_WHEEL_MIRROR.words() == [made.as_uri()]
