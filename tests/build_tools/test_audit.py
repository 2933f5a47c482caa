"""The audit: a good wheel breaks no rule, and a wheel with one fault the one rule for it."""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_wheels
import spoiled_wheels
from small_wheels import HERE, MATRIX, TORCH, Factory
from spoiled_wheels import SPOILED, Draft, Spoil, spoiled
from stand_ins import with_a_bad_stream

from build_tools import audit, audit_files, audit_tools, elf, fetch
from build_tools.__main__ import main
from build_tools.arch import Arch
from build_tools.audit import BROKEN, OK, SKIPPED
from build_tools.audit_native import MANYLINUX_2_28
from build_tools.audit_wheel import AuditedWheel, Context
from build_tools.matrix_facts import kernel_archs
from build_tools.zip_file import read, write

TORCH_HERE = fetch.installed_torch(sys.executable)
RULES = [rule.__name__ for rule in audit.RULES]
# What the tools say of a good wheel.
AUDITWHEEL: dict[str, Any] = {
    "sym_tag": "manylinux_2_24_x86_64",
    "external_libs": {"libtorch.so": None, "libtorch_cpu.so": None},
    "policy_upgrades": {"manylinux_2_28_x86_64": {"libs_to_eliminate": ["libtorch.so"]}},
}
TORCH_ABI_AUDIT: dict[str, Any] = {
    "extensions": [],
    "bundled_libs": [
        {
            "torch": {
                "stable": True,
                "min_torch_version": "2.10.0",
                "unstable_symbols": [],
                "unknown_shim_symbols": [],
            }
        }
    ],
}


@pytest.fixture(scope="module")
def wheel(factory: Factory) -> Path:
    """A real one, for the torch here and GPUs of compute capability 9.0."""
    return factory.build(f"whl/cu12/torch{TORCH}/sm90/flash-attn/{small_wheels.universal().name}")[
        0
    ]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the tools of others say; they take a second each, and tests of their own run them."""
    told = {"auditwheel": AUDITWHEEL, "torch-abi-audit": TORCH_ABI_AUDIT}
    monkeypatch.setattr(audit_tools, "_json", lambda program, *arguments: told[program])
    return told


def states(file: Path, factory: Factory, *torches: fetch.TorchLibraries) -> dict[str, str]:
    context = Context(MATRIX, torches or (TORCH_HERE,), factory.parts)
    return {x.rule: x.state for x in audit.audit(AuditedWheel(file), context)}


def broken(file: Path, factory: Factory) -> list[str]:
    return [rule for rule, state in states(file, factory).items() if state == BROKEN]


def needs_stable_abi(rule: str) -> None:
    if rule in ("stable_abi", "torch_abi_audit") and not HERE.is_stable:
        pytest.skip("the torch here is older than the stable ABI")


def test_a_good_wheel_breaks_nothing(wheel: Path, factory: Factory, tools: object) -> None:
    found = states(wheel, factory)
    of_stable = {"stable_abi", "torch_abi_audit"} if not HERE.is_stable else set()
    assert [rule for rule, state in found.items() if state != OK and rule not in of_stable] == []
    assert list(found) == [audit.READABLE, *RULES]


def test_the_universal_wheel_breaks_nothing(factory: Factory, tools: object) -> None:
    [universal] = factory.build(small_wheels.universal().path)
    found = states(universal, factory)
    # Of most of its torches there is no library here.
    assert [rule for rule, state in found.items() if state != OK] == ["torches_at_hand"]
    assert found["torches_at_hand"] == SKIPPED


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [(rule, spoil) for rule, spoils in SPOILED.items() for spoil in spoils],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_breaks_its_rule_alone(
    wheel: Path, factory: Factory, tools: object, tmp_path: Path, rule: str, spoil: Spoil
) -> None:
    needs_stable_abi(rule)
    assert broken(spoiled(wheel, tmp_path, spoil), factory) == [rule]


def test_every_rule_has_a_wheel_that_breaks_it() -> None:
    # What the other rules need is below: limits, places, tools. torches_at_hand never breaks.
    others = {"size", "built_again", "auditwheel", "torch_abi_audit", "torches_at_hand"}
    assert {*SPOILED, *others} == set(RULES)


def test_a_fault_that_is_none_breaks_nothing(
    wheel: Path, factory: Factory, tools: object, tmp_path: Path
) -> None:
    # So it is the fault that breaks a rule, not the writing anew.
    assert broken(spoiled(wheel, tmp_path, lambda draft: None), factory) == []


def test_a_large_wheel_is_told(
    wheel: Path, factory: Factory, tools: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_files, "MAX_DOWNLOAD", wheel.stat().st_size - 1)
    assert broken(wheel, factory) == ["size"]


def another_time(entries: Any, file: zipfile.ZipFile) -> None:
    for number, (name, entry) in enumerate(entries.items()):
        info = zipfile.ZipInfo(name, (2020 + number % 2, 1, 1, 0, 0, 0))
        file.writestr(info, entry.data)


def another_order(entries: Any, file: zipfile.ZipFile) -> None:
    for name in reversed(entries):
        file.writestr(zipfile.ZipInfo(name), entries[name].data)


def another_writer(entries: Any, file: zipfile.ZipFile) -> None:
    for name, entry in entries.items():
        file.writestr(zipfile.ZipInfo(name), entry.data)


@pytest.mark.parametrize("writer", [another_time, another_order, another_writer])
def test_a_wheel_that_was_written_otherwise_is_told(
    wheel: Path, factory: Factory, tools: object, tmp_path: Path, writer: Any
) -> None:
    with zipfile.ZipFile(tmp_path / wheel.name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        writer(read(wheel), file)
    assert broken(tmp_path / wheel.name, factory) == ["reproducible"]


def test_a_wheel_of_other_sources_is_told_where_its_parts_are(
    wheel: Path, factory: Factory, tools: object, tmp_path: Path
) -> None:
    path = "/".join(wheel.parts[-6:])

    def more_code(draft: Draft) -> None:
        draft.put("flash_attn/__init__.py", b"# changed\n")

    file = spoiled_wheels.copied(spoiled(wheel, tmp_path, more_code), tmp_path, path)
    assert broken(file, factory) == ["built_again"]
    # Without the parts nobody can tell.
    elsewhere = Factory(tmp_path / "elsewhere")
    assert states(file, elsewhere)["built_again"] == SKIPPED


@pytest.mark.parametrize(
    ("tool", "change"),
    [
        ("auditwheel", {"sym_tag": "manylinux_2_34_x86_64"}),
        ("auditwheel", {"sym_tag": "linux_x86_64"}),
        ("auditwheel", {"external_libs": {"libcudart.so.12": None}}),
        ("auditwheel", {"policy_upgrades": {"x": {"blacklisted_symbols": {"libz.so": ["a"]}}}}),
        ("torch-abi-audit", {"stable": False}),
        ("torch-abi-audit", {"unknown_shim_symbols": ["torch_new"]}),
        ("torch-abi-audit", {"min_torch_version": "2.11.0"}),
    ],
)
def test_what_a_tool_finds_breaks_its_rule(
    wheel: Path,
    factory: Factory,
    tools: dict[str, Any],
    tool: str,
    change: dict[str, Any],
) -> None:
    needs_stable_abi(tool.replace("-", "_"))
    if tool == "auditwheel":
        tools[tool] = {**AUDITWHEEL, **change}
    else:
        torch = {**TORCH_ABI_AUDIT["bundled_libs"][0]["torch"], **change}
        tools[tool] = {"extensions": [{"torch": torch}], "bundled_libs": []}
    assert broken(wheel, factory) == [tool.replace("-", "_")]


def state_by_tool(rule: str, file: Path, factory: Factory) -> str:
    """What a tool itself says; the test is skipped where it is not installed."""
    state = states(file, factory)[rule]
    return state if state != SKIPPED else pytest.skip(f"{rule} is not installed")


def test_auditwheel_itself_says_so(wheel: Path, factory: Factory, tmp_path: Path) -> None:
    assert state_by_tool("auditwheel", wheel, factory) == OK
    file = spoiled(wheel, tmp_path, spoiled_wheels.a_newer_glibc)
    assert state_by_tool("auditwheel", file, factory) == BROKEN


def test_torch_abi_audit_itself_says_so(wheel: Path, factory: Factory, tmp_path: Path) -> None:
    needs_stable_abi("torch_abi_audit")
    assert state_by_tool("torch_abi_audit", wheel, factory) == OK
    file = spoiled(wheel, tmp_path, spoiled_wheels.a_symbol_of_cplusplus)
    assert state_by_tool("torch_abi_audit", file, factory) == BROKEN


def test_a_tool_that_is_not_installed_is_told(
    wheel: Path, factory: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_tools.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(audit_tools.shutil, "which", lambda name: None)
    context = Context(MATRIX, (TORCH_HERE,), factory.parts)
    results = {x.rule: x for x in audit.audit(AuditedWheel(wheel), context)}
    assert results["auditwheel"].state == SKIPPED
    assert "pip install auditwheel" in results["auditwheel"].told


@pytest.mark.parametrize("name", ["flash_attn-2.8.3-py3-none-any.whl", "flash-attn.whl"])
def test_a_file_that_is_no_wheel_is_told_once(tmp_path: Path, factory: Factory, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a zip file")
    assert states(tmp_path / name, factory) == {audit.READABLE: BROKEN}


def test_a_damaged_wheel_is_told(
    wheel: Path, factory: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = tmp_path / wheel.name
    spoilt.write_bytes(with_a_bad_stream(wheel.read_bytes()))
    assert states(spoilt, factory) == {audit.READABLE: BROKEN}
    cut = tmp_path / "cut" / wheel.name
    cut.parent.mkdir()
    cut.write_bytes(wheel.read_bytes()[:-1000])
    for file in (spoilt, cut):
        assert main(["slim", str(file), "--arch", "90", "--to", str(tmp_path / "to")]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"build_tools: {wheel.name} is damaged, fetch or build it again: ")
        assert told.count("\n") == 1


def test_the_command_tells_every_rule_and_ends_by_them(
    wheel: Path,
    factory: Factory,
    tools: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["audit", "--parts", str(factory.parts), "--python", sys.executable]
    assert main([*command, str(wheel)]) == 0
    out = capsys.readouterr().out
    assert [rule for rule in RULES if f" {rule} " not in out] == []
    assert f"torch {TORCH_HERE.release} installed" in out
    bad = spoiled(wheel, tmp_path, spoiled_wheels.another_licence)
    assert main([*command, str(wheel), str(bad), "--json"]) == 1
    good_plain, bad_plain = json.loads(capsys.readouterr().out)
    assert good_plain["bytes"]["download"] == wheel.stat().st_size
    told = {x["rule"]: x["told"] for x in bad_plain["rules"] if x["state"] == BROKEN}
    assert told == {"licence": "METADATA says MIT and names ['LICENSE']"}
    assert main(["audit", str(tmp_path / "gone.whl")]) == 1
    assert "there is no file" in capsys.readouterr().err


def test_strict_takes_no_rule_on_trust(
    factory: Factory,
    tools: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch, "FETCHED", tmp_path)  # no torch to compare with but the one here
    [universal] = factory.build(small_wheels.universal().path)
    command = ["audit", "--parts", str(factory.parts), "--python", sys.executable, str(universal)]
    assert main(command) == 0
    assert main([*command, "--strict"]) == 1
    assert "1 skipped" in capsys.readouterr().out


def test_symbols_are_compared_with_each_torch(wheel: Path, factory: Factory, tools: object) -> None:
    # One that lacks what shims of either ABI ask for, but shows the same C++ ABI.
    kept = [x for x in TORCH_HERE.exports if "torchCheckFail" in x]
    old = fetch.TorchLibraries(f"{TORCH}.9", "made up", lambda: kept)
    assert states(wheel, factory, TORCH_HERE, old)["symbols"] == BROKEN
    other = fetch.TorchLibraries("2.99.0", "made up", list)
    assert states(wheel, factory, other)["symbols"] == SKIPPED


@pytest.mark.parametrize(
    ("os_abi", "flags", "is_for_one_arch", "arch"),
    [
        # CUDA 12, which has two layouts, and CUDA 13; read from kernels of either.
        (0x33, 0x500550, False, "80"),
        (0x33, 0x5A055A, False, "90"),
        (0x33, 0x5A0D5A, False, "90a"),
        (0x41, 0x6006402, False, "100"),
        (0x41, 0x600640A, False, "100a"),
        (0x41, 0x6005004, False, "80"),
        (0x41, 0x6005A04, False, "90"),
        (0x41, 0x6005A04, True, "90a"),
        (0x41, 0x6007802, False, "120"),
    ],
)
def test_the_architecture_of_a_cubin_is_read(
    os_abi: int, flags: int, is_for_one_arch: bool, arch: str
) -> None:
    cubin = elf.Elf(elf.CUDA, os_abi, flags, (), "", (), is_for_one_arch)
    assert cubin.arch == Arch.parse(arch)


@pytest.mark.parametrize(
    ("attributes", "arch"),
    [
        ("02090100 02020100", "90a"),
        ("040b0800 02090000 02090000 02090100", "90a"),  # eight bytes that are no attributes
        ("02090000 02020100", "90"),
        ("", "90"),
    ],
)
def test_cuda_13_says_in_a_section_what_is_for_one_architecture(attributes: str, arch: str) -> None:
    data = bytes.fromhex(attributes)
    header = bytearray(64)
    header[:8] = b"\x7fELF\x02\x01\x01\x41"
    struct.pack_into("<H", header, 18, elf.CUDA)
    struct.pack_into("<QI", header, 40, len(header) + len(data), 0x6005A04)
    struct.pack_into("<HH", header, 58, 64, 1)
    section = struct.pack("<2I4Q2I2Q", 0, 0x70000086, 0, 0, len(header), len(data), 0, 0, 4, 0)
    assert elf.read(bytes(header) + data + section).arch == Arch.parse(arch)


def test_the_kernels_of_a_wheel_say_what_they_are(factory: Factory) -> None:
    [universal] = factory.build(small_wheels.universal().path)
    wheel = AuditedWheel(universal)
    told = {str(elf.read(x.data).arch) for name, x in wheel.images.items() if "cubin" in name}
    assert told == {arch for arch in kernel_archs() if "ptx" not in arch}


@pytest.mark.parametrize(
    ("version", "is_newer"),
    [
        ("GLIBC_2.2.5", False),
        ("GLIBC_2.28", False),
        ("GLIBC_2.29", True),
        ("GLIBC_2.34", True),
        ("GLIBCXX_3.4.24", False),
        ("GLIBCXX_3.4.26", True),
        ("GLIBC_PRIVATE", True),
        ("OPENSSL_3.0.0", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, is_newer: bool) -> None:
    symbol = elf.Symbol("x", False, False, version)
    library = elf.Elf(elf.X86_64, 0, 0, (), "", (symbol,))
    assert library.newer_than(MANYLINUX_2_28) == [version] * is_newer


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 100])
def test_what_is_no_library_is_told(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "library.so"
    file.write_bytes(data)
    for given in (data, file):
        with pytest.raises(elf.ElfError, match=r"it is (no|damaged|empty)"):
            elf.read(given)


def test_writing_leaves_entries_as_they_are(wheel: Path) -> None:
    entries = read(wheel)
    assert write(entries, entries) == wheel.read_bytes()
