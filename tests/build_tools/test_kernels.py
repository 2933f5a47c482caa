"""Units, their addresses, the table they end in, and a real compile of one of them."""

from __future__ import annotations

import ctypes.util
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest
from native_tools import ROOT, Arch, codegen, kernels, needs_nvrtc

from build_tools import arch, compilers, ninja, parts
from build_tools.__main__ import main
from build_tools.arch import parse_list
from build_tools.compile_part import KILLED, TOLD
from build_tools.compile_part import main as compile_part
from build_tools.paths import support


def test_every_row_of_the_truth_becomes_units_with_names_of_their_own() -> None:
    made = codegen.units()
    expected = sum(
        len(f.kinds) * max(1, len(f.head_dims)) * len(f.dtypes) for f in support.KERNEL_FAMILIES
    )
    assert len(made) == expected
    assert len({unit.symbol for unit in made}) == expected
    assert codegen.units() == made


@pytest.mark.parametrize("unit", codegen.units(), ids=lambda unit: unit.symbol)
def test_a_unit_names_its_kernel_and_includes_what_is_there(unit: codegen.Unit) -> None:
    assert f"    {unit.symbol}(const __grid_constant__" in unit.source
    found = parts.headers(unit.source)
    assert ROOT / "csrc/host/flash.h" in found
    assert all(path.is_relative_to(ROOT / "csrc") for path in found)


def test_kinds_and_dtypes_are_those_of_the_host_library() -> None:
    registry = (ROOT / "csrc/host/registry.cpp").read_text("utf-8")
    names = re.search(r"kKindNames\[\] = \{(.*?)\}", registry, re.DOTALL)
    assert names is not None
    assert re.findall(r'"(\w+)"', names[1]) == list(codegen.KINDS)
    dtypes = re.search(r"kDtypeNames\[\] = \{(.*?)\}", registry, re.DOTALL)
    assert dtypes is not None
    assert re.findall(r'"(\w+)"', dtypes[1]) == [short for short, _ in codegen.DTYPES.values()]


def test_an_address_depends_on_source_headers_arch_and_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = codegen.units()[0]
    base = parts.make_part(unit, Arch.parse("90"), "compiler 1", tmp_path)
    again = parts.make_part(unit, Arch.parse("90"), "compiler 1", tmp_path)
    assert base == again
    others = [
        parts.make_part(unit, Arch.parse("80"), "compiler 1", tmp_path),
        parts.make_part(unit, Arch.parse("90"), "compiler 2", tmp_path),
        parts.make_part(codegen.units()[1], Arch.parse("90"), "compiler 1", tmp_path),
    ]
    monkeypatch.setattr(parts, "_bytes_of", lambda path: path.read_bytes() + b"// edited")
    others.append(parts.make_part(unit, Arch.parse("90"), "compiler 1", tmp_path))
    assert len({part.stem for part in (base, *others)}) == 5


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80,90", ["80", "90"]),
        ("8.0;9.0+PTX", ["80", "90", "90+ptx"]),
        ("sm_90a 80+ptx", ["90a", "80+ptx"]),
        ("10.0 12.0", ["100", "120"]),
        ("8.0;9.0;", ["80", "90"]),
        ("Hopper", ["90", "90+ptx"]),
        ("Ampere;Ampere+Tegra;12.0", ["80", "86", "86+ptx", "87", "120"]),
    ],
)
def test_architectures_are_read_in_every_usual_spelling(text: str, archs: list[str]) -> None:
    assert [str(arch) for arch in parse_list(text) or []] == archs


def test_a_misspelt_architecture_is_told() -> None:
    for text, word in (("80,hoper", "hoper"), (";", ";")):
        with pytest.raises(ValueError, match=f"^'{word}' is no CUDA architecture"):
            parse_list(text)
    assert parse_list("ALL") is None


def test_what_is_wanted_is_told_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FLASH_ATTN_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ada;Volta")
    with pytest.raises(ValueError, match=r"^TORCH_CUDA_ARCH_LIST is set to 'Ada;Volta': 'Volta' "):
        arch.wanted(None)
    assert arch.wanted("90") == [Arch(90)]


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 9.0; echo 8.6; echo 9.0", ["86", "90"]),
        ("echo 8.6; echo '[N/A]'", ["86"]),
        ("echo '[Insufficient Permissions]'", []),
        ("echo 8.6; exit 9", []),
        ("exec sleep 60", []),
    ],
)
def test_gpus_that_the_driver_tells_are_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, gpus: list[str]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(arch, "TIMEOUT", 1.0)
    assert [str(gpu) for gpu in arch.local_gpus()] == gpus


@pytest.mark.parametrize(
    ("asked", "has", "served"),
    [
        ("80", "80 86 90 80+ptx", "80"),
        ("87", "80 86 90 80+ptx", "86"),
        ("103", "90 100 80+ptx", "100"),
        ("110", "90 100 120 80+ptx", "80+ptx"),
        ("75", "80 90 80+ptx", None),
        ("90+ptx", "80 90 80+ptx", "80+ptx"),
        ("90", "90a", "90a"),
        ("100", "90a", None),
        ("100", "90a 80+ptx", "80+ptx"),
    ],
)
def test_a_device_gets_what_it_runs_best(asked: str, has: str, served: Optional[str]) -> None:
    found = kernels.serving(Arch.parse(asked), [Arch.parse(x) for x in has.split()])
    assert (str(found) if found else None) == served


class OldCompiler:
    """Knows 8.0 and 9.0."""

    identity, path = "old 1.0", Path("old")

    def supports(self, arch: Arch) -> bool:
        return arch.number <= 90

    def compile(self, source: str, arch: Arch) -> tuple[bytes, str]:
        return b"", ""


def test_what_a_compiler_does_not_know_is_left_out_of_all_but_told_if_asked_for() -> None:
    made = kernels.plan(OldCompiler(), None)
    assert {part.arch.number for part in made} == {80, 86, 89, 90}
    with pytest.raises(ninja.BuildError, match=r"^old 1\.0 does not know sm_100, sm_120; a newer"):
        kernels.plan(OldCompiler(), parse_list("80,100,120"))


def test_a_build_of_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilers, "make", lambda name, path: OldCompiler())
    with pytest.raises(ninja.BuildError, match=r"^there is no kernel to build for 75$"):
        kernels.build("75", target=tmp_path / "kernels", folder=tmp_path)
    assert capsys.readouterr().out == "no kernel of the table runs on 75\n"
    with pytest.raises(ninja.BuildError, match=r"^there is no kernel with xyz in its name to "):
        kernels.build("80", only="xyz", target=tmp_path / "kernels", folder=tmp_path)
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "kernels --compiler nvcc --compiler-path /bin/false",
            "/bin/false is no nvcc: it does not",
        ),
        ("kernels --compiler-path {libc}", "{libc} is no NVRTC: it does not tell its version"),
        ("kernels --arch 90 --jobs -3", "--jobs is -3; it must be a positive number"),
        ("shim --python /bin/true", "/bin/true cannot import torch, whose headers the shim needs"),
        ("serve . --port 99999", "--port is 99999; it must be 0 to 65535"),
    ],
)
def test_a_command_with_wrong_options_is_told_in_a_line(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "jobs" in command:
        needs_nvrtc()
    libc = ctypes.util.find_library("c") or pytest.skip("there is no libc to find")
    assert main(command.format(libc=libc).split()) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"build_tools: {words.format(libc=libc)}")
    assert told.count("\n") == 1


def test_an_interrupted_build_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> list[parts.Part]:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "build", interrupted)
    assert main(["kernels"]) == 130
    assert capsys.readouterr().err == (
        "build_tools: interrupted; run again it goes on where it stopped\n"
    )


def test_the_table_has_a_row_for_each_image(tmp_path: Path) -> None:
    unit = next(unit for unit in codegen.units() if unit.family == "sm80")
    part = parts.make_part(unit, Arch.parse("90"), "c", tmp_path)
    text = kernels.index_text([part], {part: "sm_90/x.cubin"})
    row = f"forward sm80 64 fp16 90 cubin {unit.symbol} sm_90/x.cubin"
    assert text.splitlines() == ["flash-attn-kernels 1", row]


def test_what_ptxas_says_is_read(tmp_path: Path) -> None:
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90'\n"
        "    400 bytes stack frame, 500 bytes spill stores, 416 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 400 bytes cumulative stack size\n"
    )
    facts = parts.facts_of_log(log, 1.234, 170, b"abc")
    assert facts == parts.Facts(255, 500, 416, 400, 1.23, 170, 3)
    remark = "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    told = parts.facts_of_log(f"{log}ptxas info    : {remark}\n", 1.234, 170, b"abc")
    assert told == replace(facts, remark=remark)

    unit = next(unit for unit in codegen.units() if unit.kind == "forward")
    slow, fast = (parts.make_part(unit, Arch.parse(x), "c", tmp_path) for x in ("80", "90"))
    slow.store(b"abc", told)
    fast.store(b"abc", replace(facts, spill_stores=0))
    start = f"warning: {unit.symbol} 80"
    assert list(kernels.warnings([slow, fast])) == [
        f"{start} spills registers",
        f"{start}: ptxas says {remark}",
    ]


def test_progress_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = io.StringIO("@1/4@ first\nninja: entering\nsomething said\n")
    ninja.show(lines, start=0.0)
    progress, said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[1/4\] +\d+ s, +\d+ s to go  first", progress)
    assert said == "something said"


def test_one_kernel_compiles_for_each_architecture(tmp_path: Path) -> None:
    compiler = needs_nvrtc()
    unit = next(unit for unit in codegen.units() if unit.kind == "delta")
    archs = [arch for arch in kernels.archs_of(unit, None) if compiler.supports(arch)]
    made = [parts.make_part(unit, arch, compiler.identity, tmp_path) for arch in archs]
    ninja.build(made, "nvrtc", None, tmp_path, jobs=2)
    kernels.install(made, tmp_path / "kernels")
    for part in made:
        image = tmp_path / "kernels" / part.arch.flag / f"{unit.symbol}.{part.arch.form}"
        start = image.read_bytes()[:4]
        assert start == (b"//\n/" if part.arch.is_ptx else b"\x7fELF")
        assert part.arch.is_ptx or part.facts().registers > 0
    # A second build compiles nothing.
    times = [part.code.stat().st_mtime_ns for part in made]
    ninja.build(made, "nvrtc", None, tmp_path, jobs=2)
    assert [part.code.stat().st_mtime_ns for part in made] == times
    # One whose code was lost is compiled again.
    made[0].code.write_bytes(b"")
    ninja.build(made, "nvrtc", None, tmp_path, jobs=2)
    assert made[0].is_built
    assert f"{len(made)} images" in kernels.report(made)


RESULTS = [
    json.loads(path.read_text("utf-8"))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*-build-*.json"))
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: f"{result['date']}-{result['arch']}")
def test_a_measured_build_keeps_to_the_budget(result: dict[str, Any]) -> None:
    # Six minutes on two cores, a gigabyte a compiler: benchmarks/README.md.
    assert result["jobs"] * result["seconds"]["kernels"] < 2 * 360
    assert max(row["peak_mb"] for row in result["rows"]) < 1000


def test_a_unit_that_does_not_compile_is_told_with_the_compilers_words() -> None:
    with pytest.raises(compilers.CompileError, match=r"identifier \"nonsense\" is undefined"):
        needs_nvrtc().compile("__global__ void f() { nonsense(); }", Arch.parse("90"))


def test_killed_compilers_are_tried_again_with_fewer_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [parts.make_part(unit, Arch.parse("90"), "c", tmp_path) for unit in codegen.units()[:3]]
    facts = parts.Facts(1, 0, 0, 0, 0.1, 1, 1)
    seen = []

    def run(file: Path, folder: Path, jobs: int) -> None:
        seen.append(jobs)
        for part in made if jobs == 1 else made[: 2 - len(seen)]:
            part.store(b"x", facts)

    monkeypatch.setattr(ninja, "_run", run)
    ninja.build(made, "nvrtc", None, tmp_path, jobs=4)
    assert seen == [4, 2, 1]
    assert "2 compilers were killed; going on with 2 at a time" in capsys.readouterr().out


def test_a_compiler_that_is_always_killed_ends_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [parts.make_part(codegen.units()[0], Arch.parse("90"), "c", tmp_path)]
    monkeypatch.setattr(ninja, "_run", lambda file, folder, jobs: None)
    with pytest.raises(ninja.BuildError, match="too little memory"):
        ninja.build(made, "nvrtc", None, tmp_path, jobs=2)


def test_sources_that_change_while_building_are_told(tmp_path: Path) -> None:
    compiler = needs_nvrtc()
    part = parts.make_part(codegen.units()[0], Arch.parse("90"), compiler.identity, tmp_path)
    job = tmp_path / "job"
    job.write_text(
        f'{{"symbol": "{part.unit.symbol}", "arch": "90", "compiler": "nvrtc", "path": null, '
        f'"folder": "{tmp_path}", "stem": "before"}}',
        "utf-8",
    )
    assert compile_part(str(job)) == TOLD
    assert (tmp_path / "before.error").read_text("utf-8") == "sources changed while building"


@pytest.fixture
def part(tmp_path: Path) -> parts.Part:
    """One that is not built yet, in a folder of its own."""
    (tmp_path / "parts").mkdir()
    return parts.make_part(codegen.units()[0], Arch.parse("90"), "c", tmp_path / "parts")


def fake_python(file: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What parts are compiled by, in place of Python; the job is its `$3`."""
    file.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    file.chmod(0o755)
    found = ninja.find_ninja()
    monkeypatch.setattr(ninja, "find_ninja", lambda: found)
    monkeypatch.setattr(ninja.sys, "executable", str(file))


def test_a_damaged_part_is_not_built(part: parts.Part) -> None:
    def store() -> None:
        part.store(b"code", parts.Facts(1, 0, 0, 0, 0.1, 1, len(b"code")))

    assert not part.is_built
    for file in (part.code, part.facts_file):
        for text in ("", "cod", "{}", '{"registers": 1}'):
            store()
            assert part.is_built
            file.write_text(text, "utf-8")
            assert not part.is_built
    store()
    assert {path.suffix for path in part.folder.iterdir()} == {".cubin", ".json"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -9 $$", r"^compiling \w+-sm_90-\w+ is killed each time: too little memory\?$"),
        ("exit 137", "too little memory"),
        ('echo refused > "${3%.job}.error"; exit 3', r"^1 units do not compile\.\n(.|\n)*refused"),
        ("echo no room >&2; exit 1", r"^compiling failed: no room$"),
        ("exit 9", r"^compiling failed: ninja ended with status [19]$"),
    ],
)
def test_only_a_compiler_that_is_killed_found_too_little_memory(
    part: parts.Part, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    fake_python(part.folder / "python", script, monkeypatch)
    with pytest.raises(ninja.BuildError, match=words):
        ninja.build([part], "nvrtc", None, part.folder, jobs=1)


def test_what_ninja_has_to_say_is_told(part: parts.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    program = part.folder / "ninja"
    program.write_text("#!/bin/sh\necho ninja: error: no luck\nexit 1\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(ninja, "find_ninja", lambda: str(program))
    with pytest.raises(ninja.BuildError, match=r"^compiling failed: ninja: error: no luck$"):
        ninja.build([part], "nvrtc", None, part.folder, jobs=1)


@pytest.mark.parametrize("name", ["py thon", "py$HOME", "py'thon", 'py"thon'])
def test_a_python_may_stand_anywhere(
    part: parts.Part, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake_python(part.folder / name, "echo as named; exit 1", monkeypatch)
    with pytest.raises(ninja.BuildError, match=r"^compiling failed: as named$"):
        ninja.build([part], "nvrtc", None, part.folder, jobs=1)


class Failing(OldCompiler):
    """Fails otherwise than by refusing a source."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def compile(self, source: str, arch: Arch) -> tuple[bytes, str]:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (OSError(28, "No space left on device"), TOLD, "OSError: [Errno 28] No space left on"),
        (compilers.CompileError("no such thing"), TOLD, "no such thing"),
        (MemoryError(), KILLED, ""),
    ],
)
def test_a_part_tells_what_kept_it_from_being_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compilers, "make", lambda name, path: Failing(error))
    part = parts.make_part(codegen.units()[0], Arch.parse("90"), Failing.identity, tmp_path)
    ninja._write([part], "nvrtc", None, tmp_path)
    job = str(tmp_path / f"{part.stem}.job")
    assert compile_part(job) == status
    assert (part.error.read_text("utf-8") if part.error.exists() else "").startswith(told)
    if status == TOLD:
        part.error.unlink()
        part.error.symlink_to("/dev/full")
        assert compile_part(job) == 1
        assert f"{part.stem}: {told}" in capsys.readouterr().err


def test_settings_of_nvcc_are_checked_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 12.8, V12.8.93\n", "utf-8")
    nvcc.chmod(0o755)
    assert compilers.make("nvcc", str(nvcc)).identity == "nvcc 12.8.93"
    monkeypatch.setenv("NVCC_THREADS", "abc")
    with pytest.raises(ValueError, match="NVCC_THREADS is set to 'abc'; it must be a positive"):
        compilers.make("nvcc", str(nvcc))
