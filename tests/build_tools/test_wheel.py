"""What `pip install .` makes of the kernels: when they are compiled, what the wheel then holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import BytesParser
from pathlib import Path
from typing import NamedTuple

import pytest
from native_tools import ROOT, codegen, native, needs
from setuptools.errors import ExecError, OptionError
from test_house import project_files

from build_tools import arch, backend, compilers, install, ninja, prebuilt
from build_tools.paths import env

NAMES = [name for v in env.BUILD_VARIABLES for name in (v.name, *v.aliases)]


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nothing is set and no GPU is found."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(arch, "local_gpus", list)
    monkeypatch.setattr(install, "builds_kernels", install.builds_kernels.__wrapped__)
    return monkeypatch


@pytest.mark.parametrize(
    ("settings", "gpus", "builds"),
    [
        ("", "", False),
        ("", "90", True),
        ("", "75", False),
        ("", "75 86", True),
        ("", "103", True),
        ("FLASH_ATTN_CUDA_ARCHS=90", "", True),
        ("TORCH_CUDA_ARCH_LIST=8.0;9.0", "", True),
        ("FLASH_ATTENTION_FORCE_BUILD=TRUE", "", True),
        ("FLASH_ATTENTION_FORCE_BUILD=false", "", False),
        ("FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE", "90", False),
        ("FLASH_ATTENTION_SKIP_CUDA_BUILD=true FLASH_ATTN_CUDA_ARCHS=90", "", False),
        ("FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTN_BUILD=source", "90", False),
        ("FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE", "", False),
        ("FLASH_ATTENTION_SKIP_CUDA_BUILD=FALSE", "90", True),
    ],
)
def test_kernels_are_built_on_request_or_for_a_gpu_here(
    decide: pytest.MonkeyPatch, settings: str, gpus: str, builds: bool
) -> None:
    for setting in settings.split():
        decide.setenv(*setting.split("=", 1))
    decide.setattr(arch, "local_gpus", lambda: [arch.Arch.parse(x) for x in gpus.split()])
    assert install.builds_kernels() is builds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("SKIP_CUDA_BUILD=yes", "FLASH_ATTENTION_SKIP_CUDA_BUILD is set to 'yes'; it must be TRUE"),
        ("FORCE_BUILD=2", "FLASH_ATTENTION_FORCE_BUILD is set to '2'; it must be TRUE or FALSE"),
    ],
)
def test_a_wrong_switch_is_told(decide: pytest.MonkeyPatch, settings: str, message: str) -> None:
    for setting in settings.split():
        name, text = setting.split("=")
        decide.setenv(f"FLASH_ATTENTION_{name}", text)
    with pytest.raises(OptionError, match=re.escape(message)):
        install.builds_kernels()


def test_only_linux_builds_kernels(decide: pytest.MonkeyPatch) -> None:
    decide.setattr(arch, "local_gpus", lambda: [arch.Arch(90)])
    decide.setattr(install.sys, "platform", "win32")
    assert not install.builds_kernels()
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", "90")
    with pytest.raises(OptionError, match="CUDA kernels are built on Linux only"):
        install.builds_kernels()


@pytest.mark.parametrize(
    ("missing", "wanted"),
    [
        ("", []),
        ("ninja", ["ninja"]),
        ("nvrtc", ["nvidia-cuda-nvrtc-cu12>=12.8"]),
        ("torch", ["torch>=2.4"]),
        ("ninja nvrtc torch", ["ninja", "nvidia-cuda-nvrtc-cu12>=12.8", "torch>=2.4"]),
    ],
)
@pytest.mark.parametrize("hook", ["wheel", "editable"])
def test_an_isolated_build_asks_for_what_it_lacks(
    decide: pytest.MonkeyPatch, tmp_path: Path, hook: str, missing: str, wanted: list[str]
) -> None:
    def lacks(error: type[Exception]) -> str:
        raise error

    decide.setattr(
        ninja, "find_ninja", lambda: lacks(ninja.BuildError) if "ninja" in missing else "ninja"
    )
    decide.setattr(
        compilers, "find_nvrtc", lambda: lacks(FileNotFoundError) if "nvrtc" in missing else ""
    )
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").touch()
    decide.setattr(backend, "package_folders", lambda: [] if "torch" in missing else [tmp_path])
    decide.setattr(prebuilt, "torch_here", lambda: None)
    decide.setattr(backend.build_meta, f"get_requires_for_build_{hook}", lambda settings: [])
    requires = getattr(backend, f"get_requires_for_build_{hook}")
    assert requires() == [], "nothing is needed where nothing is compiled"
    decide.setenv("FLASH_ATTN_CUDA_ARCHS", "90")
    assert requires() == wanted


def test_packages_that_an_isolated_build_hides_are_found() -> None:
    # -S: a process that does not see the environment's packages, as in an isolated build.
    program = "from build_tools.paths import package_folders; print(*package_folders(), sep='\\n')"
    command = [sys.executable, "-S", "-c", program]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(Path(pytest.__file__).parents[1]) in told.splitlines()


def test_what_to_install_is_told_word_for_word(decide: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decide.setenv("CUDA_HOME", str(tmp_path))
    decide.setattr(compilers, "package_folders", list)
    command = re.escape("`pip install 'nvidia-cuda-nvrtc-cu12>=12.8' ninja`")
    with pytest.raises(FileNotFoundError, match=rf"^NVRTC 12\.8 or later, .* {command}$"):
        compilers.find_nvrtc()
    decide.setattr(ninja.shutil, "which", lambda name: None)
    decide.setattr(ninja.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ninja.BuildError, match=command):
        ninja.find_ninja()


def test_an_old_nvrtc_is_passed_over(decide: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = {"a": (12, 1), "b": (13, 0), "c": (12, 9), "d": (0, 0)}
    for name in versions:
        library = tmp_path / name / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
        library.parent.mkdir(parents=True)
        library.touch()
    decide.setattr(compilers, "package_folders", lambda: sorted(tmp_path.iterdir()))
    decide.setattr(compilers, "version_of", lambda path: versions[path.parents[3].name])
    decide.setenv("CUDA_HOME", str(tmp_path / "none"))
    assert compilers.find_nvrtc().parents[3].name == "b"
    versions.update(b=(12, 4), c=(11, 8))
    with pytest.raises(FileNotFoundError, match=r"12\.8 or later, .* installed, only 12\.4: `pip"):
        compilers.find_nvrtc()


def test_kernels_stay_where_new_ones_cannot_be_copied(
    decide: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, package = tmp_path / "made", tmp_path / "package"
    for folder, text in ((made, "new"), (package, "old")):
        for name in (f"kernels/sm_90/{text}.cubin", "kernels/index.txt", f"_shim_{text}.so"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8")

    def files() -> list[str]:
        found = [path for path in package.rglob("*") if path.is_file()]
        return sorted(f"{x.relative_to(package)} {x.read_text('utf-8')}" for x in found)

    before, copy, room = files(), shutil.copy, [1]

    def on_a_full_disk(source: Path, target: Path) -> None:
        if not room:
            raise OSError(28, "No space left on device", str(target))
        copy(source, target)
        room.pop()

    def run() -> None:
        command = install.BuildNative(install.BinaryDistribution())
        command.editable_mode = True
        command.run()

    decide.setattr(install, "make", lambda folder: None)
    decide.setattr(install, "torch_here", lambda: native.Torch((2, 10), made, made, True))
    decide.setattr(install, "STAGE", made)
    decide.setattr(install, "PACKAGE", package)
    with decide.context() as full:
        full.setattr(install.shutil, "copy", on_a_full_disk)
        with pytest.raises(ExecError, match=r"kernels cannot be built: \[Errno 28\] No space left"):
            run()
    assert files() == before
    run()
    assert files() == ["_shim_new.so new", "kernels/index.txt new", "kernels/sm_90/new.cubin new"]
    assert not (package / "kernels.new").exists()


class Tree:
    """A copy of the project, and the wheels that pip makes of it on a machine without a GPU."""

    def __init__(self, folder: Path) -> None:
        self.source, self.tools = folder / "source", folder / "tools"
        for path in project_files():
            (self.source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, self.source / path)
        self.tools.mkdir()
        (self.tools / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n", "utf-8")
        (self.tools / "nvidia-smi").chmod(0o755)

    def pip_wheel(self, out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
        out.mkdir()
        inherited = {name: text for name, text in os.environ.items() if name not in NAMES}
        path = os.pathsep.join((str(self.tools), inherited.get("PATH", "")))
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out))
        return subprocess.run(
            [sys.executable, "-m", "pip", "wheel", *options, str(self.source)],
            env={**inherited, "PATH": path, **settings},
            capture_output=True,
            text=True,
            check=False,
            cwd=out,
        )


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_two_installations_from_one_checkout_take_turns(tmp_path: Path, hook: str) -> None:
    tree = Tree(tmp_path)
    environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}

    def start(program: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=tree.source,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    holder = "from build_tools import install\nwith install.turn(): print('mine', flush=True)"
    with start(f"{holder}; input()") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        second = start(f"import sys; from build_tools import backend as b; b.{hook}(sys.argv[1])")
        assert second.stderr is not None
        words = f"another installation builds in {tree.source}; waiting for it to end"
        assert any(words in line for line in second.stderr)
        assert not list(tmp_path.glob("*.whl"))
        first.communicate("\n")
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert len(list(tmp_path.glob("flash_attn-2.8.3-*py3-none-any.whl"))) == 1


class Wheels(NamedTuple):
    """What one tree gave, one after the other."""

    compiled: Path
    pure: Path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Wheels of a tree that holds kernels built in place: for 9.0, then without kernels."""
    needs("g++")
    try:
        compilers.find_nvrtc()
        ninja.find_ninja()
    except (FileNotFoundError, ninja.BuildError) as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("wheels")
    tree = Tree(folder)
    old = tree.source / "flash_attn" / "kernels" / "sm_80" / "old.cubin"
    old.parent.mkdir(parents=True)
    for path in (old, tree.source / "flash_attn" / "_shim_old.so"):
        path.touch()
    made = []
    for name, settings in (("compiled", {"FLASH_ATTN_CUDA_ARCHS": "9.0"}), ("pure", {})):
        child = tree.pip_wheel(folder / name, **settings)
        assert child.returncode == 0, child.stdout + child.stderr
        made += (folder / name).iterdir()
    return Wheels(*made)


def native_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {
            name
            for name in file.namelist()
            if name.startswith("flash_attn/kernels/") or name.endswith((".so", ".cubin"))
        }


def test_a_compiled_wheel_holds_kernels_libraries_and_nothing_stale(wheels: Wheels) -> None:
    shim = native.shim_name(native.find_torch())
    # A GPU of 9.0 runs both: for 90a what is Hopper's own, for 90 the rest.
    folders = {u.symbol: "sm_90" if "90" in u.archs else "sm_90a" for u in codegen.units()}
    assert native_files(wheels.compiled) == {
        f"flash_attn/{native.HOST_LIBRARY}",
        f"flash_attn/{shim}",
        "flash_attn/kernels/index.txt",
        *(f"flash_attn/kernels/{folder}/{symbol}.cubin" for symbol, folder in folders.items()),
    }
    assert native_files(wheels.pure) == set()


def test_a_compiled_wheel_is_marked_for_the_platform_and_any_python(wheels: Wheels) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    torch = native.find_torch()
    # One shim serves torch 2.10 and all later; an older torch stands in the build number.
    build = "" if torch.is_stable else "0torch{}.{}-".format(*torch.version)
    assert wheels.compiled.name == f"flash_attn-2.8.3-{build}py3-none-{platform}.whl"
    assert wheels.pure.name == "flash_attn-2.8.3-py3-none-any.whl"
    with zipfile.ZipFile(wheels.compiled) as file:
        told = BytesParser().parsebytes(file.read("flash_attn-2.8.3.dist-info/WHEEL"))
        metadata = file.read("flash_attn-2.8.3.dist-info/METADATA")
    assert told["Root-Is-Purelib"] == "false"
    assert told.get_all("Tag") == [f"py3-none-{platform}"]
    with zipfile.ZipFile(wheels.pure) as file:
        assert file.read("flash_attn-2.8.3.dist-info/METADATA") == metadata


def test_an_installed_wheel_finds_its_kernels(wheels: Wheels, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels.compiled) as file:
        file.extractall(tmp_path)
    program = """
from flash_attn.backends import cuda
from flash_attn._problem import Problem
for capability in ((9, 0), (8, 0)):
    print(cuda.why_not(Problem("cuda", "bfloat16", 128, 128, capability=capability)))
"""
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    served, refused = child.stdout.splitlines()
    assert served == "[]"
    assert "was built for 9.0" in refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        (
            {"FLASH_ATTN_CUDA_ARCHS": "hoper"},
            "FLASH_ATTN_CUDA_ARCHS is set to 'hoper': 'hoper' is no CUDA architecture",
        ),
        ({"MAX_JOBS": "many"}, "MAX_JOBS is set to 'many'; it must be a positive number"),
    ],
    ids=["compiler", "architecture", "jobs"],
)
def test_a_build_that_fails_says_why_once_and_leaves_no_wheel(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    tree = Tree(tmp_path)
    child = tree.pip_wheel(tmp_path / "out", **{"FLASH_ATTN_CUDA_ARCHS": "90", **settings})
    assert child.returncode != 0
    told = child.stdout + child.stderr
    assert told.count("error: the CUDA kernels cannot be built: ") == 1
    assert message in told
    assert "hint: FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE installs the package without" in told
    assert "Traceback" not in told
    assert list((tmp_path / "out").iterdir()) == []
