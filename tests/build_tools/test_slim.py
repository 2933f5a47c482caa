"""Smaller wheels cut out of bigger ones: what is kept, and that `build` would make the same."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import small_wheels
from native_tools import native
from small_wheels import MATRIX, TORCH, Factory

from build_tools import slim
from build_tools.__main__ import main
from build_tools.matrix_facts import numbers


@pytest.fixture(scope="module")
def universal(factory: Factory) -> Path:
    return factory.build(small_wheels.universal().path)[0]


def cut(wheel: Path, to: Path, *options: str) -> Path:
    """The one wheel that the command leaves."""
    assert main(["slim", str(wheel), "--to", str(to), *options]) == 0
    [made] = to.rglob("*.whl")
    return made


def compiled(wheel: Path) -> tuple[set[str], set[str]]:
    """(folders of kernels, shims) of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    folders = {name.split("/")[2] for name in names if name.endswith((".cubin", ".ptx"))}
    return folders, {name.split("/")[1] for name in names if "/_shim_" in name}


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (f"--arch 90 --torch {TORCH}", f"whl/cu12/torch{TORCH}/sm90"),
        (f"--arch 80,86,89 --torch {TORCH}", f"whl/cu12/torch{TORCH}/sm80"),
        (f"--arch all --torch {TORCH}", f"whl/cu12/torch{TORCH}"),
    ],
)
def test_it_is_the_wheel_that_build_makes(
    factory: Factory, universal: Path, tmp_path: Path, options: str, path: str
) -> None:
    made = cut(universal, tmp_path, *options.split())
    assert made.relative_to(tmp_path).as_posix() == f"{path}/flash-attn/{universal.name}"
    [built] = factory.build(made.relative_to(tmp_path).as_posix())
    assert made.read_bytes() == built.read_bytes()
    assert made.stat().st_size < universal.stat().st_size


@pytest.mark.parametrize(
    ("arch", "kept"),
    [
        ("90", ["sm_90", "sm_90a"]),
        ("8.0 9.0", ["sm_80", "sm_90", "sm_90a"]),
        ("103", ["sm_100"]),
        ("87", ["sm_86"]),
        ("110", ["compute_80"]),
        ("9.0+PTX", ["sm_90", "sm_90a", "compute_80"]),
    ],
)
def test_a_gpu_keeps_what_it_runs_best(
    universal: Path, tmp_path: Path, arch: str, kept: list[str]
) -> None:
    folders, shims = compiled(cut(universal, tmp_path, "--arch", arch))
    assert folders == set(kept)
    assert shims == compiled(universal)[1]


@pytest.mark.parametrize("torch", MATRIX.facts.torch)
def test_a_torch_keeps_its_shims(universal: Path, tmp_path: Path, torch: str) -> None:
    made = cut(universal, tmp_path, "--torch", torch)
    folders, shims = compiled(made)
    assert folders == compiled(universal)[0]
    wanted = {native.shim_file(numbers(torch), abi) for abi in (True, False)}
    assert shims == wanted & compiled(universal)[1] != set()
    with zipfile.ZipFile(made) as file:
        metadata = file.read("flash_attn-2.8.3.dist-info/METADATA").decode()
    assert f"\nRequires-Dist: torch=={torch}.*\n" in metadata


def test_what_was_cut_can_be_cut_again(universal: Path, tmp_path: Path) -> None:
    once = cut(universal, tmp_path / "once", "--arch", "80,90")
    assert once.parts[-3] == "sm80-90-90a"
    twice = cut(once, tmp_path / "twice", "--arch", "90")
    straight = cut(universal, tmp_path / "straight", "--arch", "90")
    assert twice.read_bytes() == straight.read_bytes()


def test_a_published_name_becomes_a_plain_wheel(factory: Factory, tmp_path: Path) -> None:
    [published] = factory.build(
        f"*+cu12torch{TORCH}cxx11abiTRUE-cp311-cp311-{small_wheels.platform()}.whl"
    )
    made = cut(published, tmp_path, "--arch", "90")
    assert made.parts[-5:-2] == ("cu12", f"torch{TORCH}", "sm90")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "say what to keep: --arch, --torch or both"),
        ("--arch 75", "none of its kernels runs on 75: they are for 80, 86, 89, 90, 90a, 100"),
        ("--arch hoper", "'hoper' is no CUDA architecture"),
        ("--torch 2", "--torch is '2'; it takes a minor version such as 2.11"),
        ("--torch 2.11.0", "--torch is '2.11.0'; it takes a minor version such as 2.11"),
        ("--torch 2.3", "it has no shim for torch 2.3; it has those for: 2.4, 2.5, 2.6, 2.7"),
    ],
)
def test_what_cannot_be_kept_is_told(
    universal: Path, tmp_path: Path, options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slim", str(universal), "--to", str(tmp_path), *options.split()]) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flash_attn-2.8.4-py3-none-manylinux_2_28_x86_64.whl", "is release 2.8.4; these tools"),
        ("flash_attn-2.8.3-py3-none-macosx_14_0_arm64.whl", "macosx_14_0_arm64 is no platform"),
        ("flash-attn.whl", "is no wheel of flash-attn"),
    ],
)
def test_a_file_of_another_kind_is_told(
    universal: Path, tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(universal, tmp_path / name)
    command = ["slim", str(tmp_path / name), "--to", str(tmp_path), "--arch", "90"]
    assert main(command) == 1
    assert words in capsys.readouterr().err


def test_a_wheel_without_kernels_is_told(tmp_path: Path) -> None:
    file = tmp_path / "flash_attn-2.8.3-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("flash_attn/__init__.py", "")
    with pytest.raises(slim.SlimError, match="has no kernels, or was not made by `build`"):
        slim.open_wheel(file)
