"""Parts are made once; wheels are put together from them, to the same bytes each time."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_wheels
from native_tools import kernels, native
from small_wheels import FEW, HERE, MATRIX, TORCH, Factory

from build_tools import (
    assemble,
    compilers,
    fetch,
    kernel_index,
    make_parts,
    ninja,
    parts,
    zip_file,
)
from build_tools.__main__ import main
from build_tools.arch import Arch
from build_tools.ninja import BuildError
from build_tools.wheel_name import WheelName

INDEX = "flash_attn/kernels/index.txt"


@pytest.fixture(scope="module")
def patterns() -> list[str]:
    """The universal wheel here, a slim one, and one under a published name."""
    wheel = small_wheels.universal()
    return [
        wheel.path,
        f"whl/cu12/torch{TORCH}/sm90/flash-attn/{wheel.name}",
        f"*+cu12torch{TORCH}cxx11abiTRUE-cp311-cp311-{small_wheels.platform()}.whl",
    ]


@pytest.fixture(scope="module")
def wheels(factory: Factory, patterns: list[str]) -> list[Path]:
    return factory.build(*patterns)


def hashes(wheels: list[Path]) -> list[str]:
    return [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def made_now(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[1] for line in lines if line.startswith("making ")]


def test_what_cibuildwheel_asks_for_is_the_universal_wheel_of_these_parts(
    factory: Factory, wheels: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = assemble.universal(tmp_path, factory.parts)
    assert (tmp_path / name).read_bytes() == wheels[0].read_bytes()
    assert name == wheels[0].name
    assert made_now(capsys) == []


def test_there_is_no_universal_wheel_for_another_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(make_parts, "platform_of_compiler", lambda: "linux_riscv64")
    with pytest.raises(BuildError, match="for linux_riscv64; there are wheels for linux_x86_64, "):
        assemble.universal(tmp_path, tmp_path)


def test_a_second_build_makes_no_part_and_the_same_bytes(
    factory: Factory, wheels: list[Path], patterns: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    again = factory.build(*patterns, to="again")
    assert made_now(capsys) == []
    assert hashes(again) == hashes(wheels)


def test_a_wheel_has_its_parts_and_the_package(wheels: list[Path]) -> None:
    universal, slim, published = map(names_in, wheels)
    for archs, names in (("all", universal), ("sm90", slim), ("all", published)):
        images = {
            f"flash_attn/kernels/{arch.flag}/{unit.symbol}.{arch.form}"
            for arch in map(make_parts.Arch.parse, MATRIX.facts.archs[archs].has)
            for unit in FEW
            if str(arch) in unit.archs
        }
        assert {name for name in names if "/kernels/" in name} == images | {INDEX}
        assert f"flash_attn/{native.HOST_LIBRARY}" in names
        assert {"flash_attn/__init__.py", "flash_attn_interface.py"} <= names
        assert not [name for name in names if name.startswith(("tests/", "build_tools/"))]
    shims = [{x for x in names if "_shim_" in x} for names in (universal, slim, published)]
    assert len(shims[0]) == len(MATRIX.facts.cxx11abi) * 5 + 2
    mine = {f"flash_attn/{native.shim_file(HERE.version, x)}" for x in (True, False)}
    assert shims[1] == shims[2] == shims[0] & mine


def test_metadata_and_record_are_those_of_the_file_name(wheels: list[Path]) -> None:
    for wheel, torch in zip(wheels, (">=2.4", f"=={TORCH}.*", f"=={TORCH}.*")):
        name = WheelName.parse(wheel.name)
        folder = f"flash_attn-{name.version}.dist-info"
        with zipfile.ZipFile(wheel) as file:
            assert file.testzip() is None
            metadata = file.read(f"{folder}/METADATA").decode()
            marks = file.read(f"{folder}/WHEEL").decode()
            record = list(csv.reader(file.read(f"{folder}/RECORD").decode().splitlines()))
            sizes = {info.filename: str(info.file_size) for info in file.infolist()}
            assert {info.date_time for info in file.infolist()} == {zip_file.EARLIEST}
        assert f"\nVersion: {name.version}\n" in metadata
        assert f"\nRequires-Dist: torch{torch}\n" in metadata
        assert f"\nTag: {name.tag}\n" in marks
        own = f"{folder}/RECORD"
        assert {row[0]: row[2] for row in record} == {**sizes, own: ""}


def test_pip_installs_it_and_the_shim_loads(wheels: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--target", str(tmp_path), str(wheels[0])], check=True)
    program = """
import torch
from flash_attn import flash_attn_func
from flash_attn.backends import cuda
print(cuda.__file__)
print(cuda._WHY_NOT_LOADED or torch.ops.flash_attn_cuda.combine)
print(flash_attn_func(*torch.ones(3, 1, 8, 2, 16)).sum().item())
"""
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    where, loaded, total = child.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert loaded == "flash_attn_cuda.combine"
    assert float(total) == 8 * 2 * 16


def test_the_bill_says_what_was_made_with_what(wheels: list[Path]) -> None:
    with zipfile.ZipFile(wheels[1]) as file:
        bill = json.loads(file.read("flash_attn-2.8.3.dist-info/sboms/flash_attn.cdx.json"))
    parts = {x["name"]: x for x in bill["components"] if "components" in x}
    outside = [x["name"] for x in bill["components"] if "components" not in x]
    assert outside == ["torch", "einops"]
    told = {x["name"]: x["value"] for x in parts["kernels-cu12-sm_90"]["properties"]}
    assert told["flash-attn:compiler"] == MATRIX.facts.cuda["12"].nvrtc
    files = {file["name"] for part in parts.values() for file in part["components"]}
    assert files == {x for x in names_in(wheels[1]) if x.endswith((".so", ".cubin"))}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / make_parts.LABEL).unlink(),
        lambda folder: (folder / make_parts.LABEL).write_text("{}", "utf-8"),
        lambda folder: next(folder.rglob("*.cubin")).write_bytes(b""),
        lambda folder: next(folder.rglob("*.cubin")).unlink(),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=["no label", "empty label", "changed file", "lost file", "gone"],
)
def test_a_part_that_is_not_whole_is_made_again(
    factory: Factory, wheels: list[Path], spoil: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(spoil)
    spoil(factory.parts / "kernels-cu12-sm_90")
    command = ["part", "kernels-cu12-sm_90", "--parts", str(factory.parts)]
    assert main(command) == 0
    assert made_now(capsys) == ["kernels-cu12-sm_90"]
    assert main(command) == 0
    assert made_now(capsys) == []


def test_a_part_of_other_sources_is_made_again(
    factory: Factory,
    wheels: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sources = make_parts._digest_of_sources
    host = f"host-{small_wheels.platform()}"
    words = [host, "kernels-cu12-sm_90"]
    monkeypatch.setattr(make_parts, "_digest_of_sources", lambda folder: f"{sources(folder)} more")
    assert main(["part", *words, "--parts", str(factory.parts)]) == 0
    assert made_now(capsys) == [host]
    monkeypatch.undo()
    assert main(["part", *words, "--parts", str(factory.parts)]) == 0
    assert made_now(capsys) == [host]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["part", "kernels-cu12-sm_75"], "there is no part kernels-cu12-sm_75; there is kernels-"),
        (["build", "--only", "*sm75*"], "no wheel fits *sm75*"),
        (["part", "host-win_amd64"], "host-win_amd64 cannot be made, here or"),
        (["build", "--only", "*-win_amd64.whl"], "host-win_amd64 cannot be made, here or"),
    ],
)
def test_what_cannot_be_made_is_told_before_anything_is(
    tmp_path: Path, command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small_wheels.platform()
    assert main([*command, "--parts", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"build_tools: {words}")
    assert "making" not in told.out
    assert list(tmp_path.iterdir()) == []


def test_kernels_whose_products_wait_are_not_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = next(unit for unit in FEW if unit.kind == "forward")
    image = parts.make_part(unit, Arch.parse("90a"), "c", tmp_path)
    remark = "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    image.store(b"abc", parts.facts_of_log(f"ptxas info    : {remark}\n", 1.0, 100, b"abc"))
    monkeypatch.setattr(kernels, "plan", lambda *_, **__: [image])
    monkeypatch.setattr(ninja, "build", lambda *_: None)
    monkeypatch.setattr(compilers, "Nvrtc", lambda path: SimpleNamespace(path=path))
    monkeypatch.setattr(fetch, "nvrtc", lambda cuda: tmp_path / "libnvrtc.so")
    part = next(part for part in small_wheels.universal().parts if part.name.endswith("sm_90a"))
    with pytest.raises(BuildError, match=f"^{part.name} is not for a release: ptxas makes"):
        make_parts.make(part, tmp_path / "parts")
    assert f"warning: {unit.symbol} 90a: ptxas says {remark}" in capsys.readouterr().out
    assert not (tmp_path / "parts" / part.name).exists()


def test_every_file_bears_the_time_that_a_build_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"a.py": zip_file.Entry(b"1"), "b/ü.so": zip_file.Entry(b"2" * 1000, True)}
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    plain = zip_file.write(entries, entries)
    assert plain == zip_file.write(entries, entries)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert zip_file.date_time() == (2023, 11, 14, 22, 13, 20)
    assert zip_file.write(entries, entries) != plain
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert zip_file.write(entries, entries) == plain
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(zip_file.TOO_LATE - 1))
    assert zip_file.date_time() == (2107, 12, 31, 23, 59, 59)
    for wrong in ("yesterday", str(zip_file.TOO_LATE), "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(ValueError, match=f"SOURCE_DATE_EPOCH is set to '{wrong}'; it must be"):
            zip_file.date_time()


def test_what_is_written_any_reader_of_zip_files_reads(tmp_path: Path) -> None:
    entries = {"a.py": zip_file.Entry(b"1"), "b/ü.so": zip_file.Entry(b"2" * 1000, True)}
    file = tmp_path / "x.zip"
    file.write_bytes(zip_file.write(entries, entries))
    with zipfile.ZipFile(file) as opened:
        assert opened.testzip() is None
        assert {info.filename: opened.read(info) for info in opened.infolist()} == {
            name: entry.data for name, entry in entries.items()
        }
    assert zip_file.read(file) == entries


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not begin with 'flash-attn-kernels 1'"),
        ("flash-attn-kernels 1\ndelta common 0\n", "line 2: a row has 8 words"),
    ],
)
def test_a_wrong_table_of_kernels_is_told(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kernel_index.parse(text)


def test_parts_of_other_sources_are_not_put_together(factory: Factory) -> None:
    row = kernel_index.Row("delta", "common", "0", "fp16", "90", "cubin", "old_delta", "x")
    with pytest.raises(ValueError, match="old_delta is not in the kernel table"):
        kernel_index.merged([[row]])


def test_names_with_commas_are_quoted_in_record() -> None:
    assert [assemble._quoted(name) for name in ("a", "a,b", 'a"b')] == ["a", '"a,b"', '"a""b"']
