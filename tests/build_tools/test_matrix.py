"""The matrix of wheels: which there are, what they are called and made of, why others are not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_tools import ROOT, native
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from build_tools import compilers, matrix_facts, matrix_report, wheel_name, wheel_parts
from build_tools.__main__ import main
from build_tools.matrix import Cell, Matrix, MatrixError
from build_tools.toml_table import TableError
from build_tools.wheel_parts import Wheel, parts_of

MATRIX = Matrix()
WHEELS = MATRIX.wheels()
PATHS = {wheel.path: wheel for wheel in WHEELS}
FILES = {str(wheel.name): wheel for wheel in WHEELS if wheel.name.variant}

# The names of the release 2.8.3, all for CUDA 12 and linux_x86_64, each under both C++ ABIs.
PUBLISHED = {
    "2.4": "cp39 cp310 cp311 cp312",
    "2.5": "cp39 cp310 cp311 cp312 cp313",
    "2.6": "cp39 cp310 cp311 cp312 cp313",
    "2.7": "cp39 cp310 cp311 cp312 cp313",
    "2.8": "cp39 cp310 cp311 cp312 cp313",
}
PUBLISHED_NAMES = [
    f"flash_attn-2.8.3+cu12torch{torch}cxx11abi{abi}-{python}-{python}-linux_x86_64.whl"
    for torch, pythons in PUBLISHED.items()
    for python in pythons.split()
    for abi in ("FALSE", "TRUE")
]

# (torch, cuda, platform, archs, cxx11abi, python), and the rules that speak against it.
COMBINATIONS = [
    ("2.4 12 linux_x86_64 all FALSE 3.9", ""),
    ("2.4 12 linux_aarch64 all TRUE 3.12", ""),
    ("2.4 12 win_amd64 all FALSE 3.12", ""),
    ("2.7 12 win_amd64 sm120 FALSE 3.13t", ""),
    ("2.9 13 linux_aarch64 sm100 TRUE 3.14t", ""),
    ("2.14 12 linux_x86_64 sm90 TRUE 3.14", ""),
    ("2.14 12 linux_x86_64 all TRUE 3.14", ""),
    ("2.15 13 win_amd64 all TRUE 3.15t", ""),
    ("2.4 12 linux_x86_64 all TRUE 3.13", "torch_python"),
    ("2.5 12 linux_x86_64 all TRUE 3.13", ""),
    ("2.5 12 linux_aarch64 all TRUE 3.13", "torch_python"),
    ("2.9 12 linux_x86_64 all TRUE 3.9", "torch_python"),
    ("2.13 13 linux_x86_64 all TRUE 3.13t", "torch_python"),
    ("2.8 13 linux_x86_64 all TRUE 3.12", "torch_cuda"),
    ("2.15 12 linux_x86_64 all TRUE 3.12", "torch_cuda"),
    ("2.9 12 linux_x86_64 all FALSE 3.12", "torch_cxx11abi"),
    ("2.6 12 linux_aarch64 all FALSE 3.12", "torch_cxx11abi"),
    ("2.6 12 linux_x86_64 sm100 TRUE 3.12", "torch_gpu"),
    ("2.14 12 linux_x86_64 sm120 TRUE 3.12", "torch_gpu"),
    ("2.15 12 win_amd64 sm90 FALSE 3.9", "torch_python torch_cuda torch_cxx11abi"),
]


def combination(text: str) -> Cell:
    return MATRIX.combination(*text.split())


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_every_published_name_is_there(name: str) -> None:
    assert FILES[name].root == "whl/cu12"


def test_the_published_names_are_as_many_as_were_released() -> None:
    assert len(PUBLISHED_NAMES) == 48


@pytest.mark.parametrize(("text", "rules"), COMBINATIONS)
def test_rules_speak_against_what_torch_does_not_have(text: str, rules: str) -> None:
    assert [rule.name for rule, _ in combination(text).reasons()] == rules.split()


@given(st.tuples(*(st.sampled_from(MATRIX.facts.axis(axis)) for axis in matrix_facts.AXES)))
def test_a_combination_is_a_cell_or_has_reasons(words: tuple[str, ...]) -> None:
    cell = MATRIX.combination(*words)
    told = [rule.reason.format(**_words(cell), has=text) for rule, text in cell.reasons()]
    assert (cell in MATRIX.cells) != bool(told)
    assert all(cell.torch.name in text for text in told)
    for wheel in cell.wheels() if not told else ():
        assert PATHS[wheel.path] == wheel


def _words(cell: Cell) -> dict[str, str]:
    return {axis: cell.value(axis) for axis in matrix_facts.AXES}


def test_every_rule_has_a_source_and_excludes_something() -> None:
    against = {rule for cell in MATRIX.combinations for rule, _ in cell.reasons()}
    assert against == set(MATRIX.facts.rules.values())
    assert all(rule.sources for rule in against)


def test_kernels_are_tested_with_the_compiler_of_the_wheels() -> None:
    asked = (ROOT / "pyproject.toml").read_text("utf-8")
    assert any(f'"{cuda.nvrtc}; ' in asked for cuda in MATRIX.facts.cuda.values())


def test_metadata_agrees_with_the_file_name() -> None:
    found = importlib.metadata.distribution("flash-attn")
    # PKG-INFO: what building a source archive left in the checkout says the same.
    base = found.read_text("METADATA") or found.read_text("PKG-INFO")
    assert base is not None
    plain = Parser().parsestr(base)
    kept = [key for key in plain if key not in ("Version", "Requires-Dist")]
    for wheel in WHEELS:
        stamped = Parser().parsestr(wheel.stamp(base))
        name, version, build, tags = parse_wheel_filename(str(wheel.name))
        assert (name, build) == ("flash-attn", ()), wheel.path
        assert Version(stamped["Version"]) == version == Version(wheel.name.version), wheel.path
        assert {str(tag) for tag in tags} == {wheel.name.tag}, wheel.path
        assert _torch_required(stamped) == f"torch=={wheel.torch}.*" or wheel.torch is None
        assert _torch_required(stamped) == _torch_required(plain) or wheel.torch is not None
        assert stamped.get_payload() == plain.get_payload()
        assert [stamped[key] for key in kept] == [plain[key] for key in kept]


def _torch_required(metadata: Message) -> str:
    required = map(Requirement, metadata.get_all("Requires-Dist"))
    return next(str(requirement) for requirement in required if requirement.name == "torch")


def test_metadata_that_cannot_be_stamped_is_refused() -> None:
    with pytest.raises(ValueError, match="one requirement of torch"):
        FILES[PUBLISHED_NAMES[0]].stamp("Name: flash-attn\nVersion: 2.8.3\n\n")


def test_a_name_is_read_as_it_was_written() -> None:
    for wheel in WHEELS:
        assert wheel_name.WheelName.parse(str(wheel.name)) == wheel.name


@pytest.mark.parametrize(
    "text",
    [
        "flash_attn-2.8.3.tar.gz",
        "flash_attn-2.8.3+cu12-cp312-cp312-linux_x86_64.whl",
        "flash_attn-2.8.3+cu12torch2.8cxx11abiMAYBE-cp312-cp312-linux_x86_64.whl",
        "other-2.8.3-py3-none-any.whl",
    ],
)
def test_another_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        wheel_name.WheelName.parse(text)


def test_a_plain_wheel_is_alone_in_its_root_on_a_platform() -> None:
    # An installer that looks at a root must have nothing to choose from but the platform.
    for root in {wheel.root for wheel in WHEELS if not wheel.name.variant}:
        tags = [w.name.tag for w in WHEELS if w.root == root and not w.name.variant]
        assert len(set(tags)) == len(tags) <= len(MATRIX.facts.platform)


def test_cells_that_share_a_plain_wheel_agree_on_what_is_in_it() -> None:
    for cell in MATRIX.cells:
        assert PATHS[cell.plain().path] == cell.plain()


# What a cell is made of, without the prefixes that all of it shares.
PARTS = {
    "2.8 12 linux_x86_64 sm90 TRUE 3.12": (
        "cu12-sm_90 cu12-sm_90a",
        "torch2.8-cxx11abiFALSE torch2.8-cxx11abiTRUE",
    ),
    "2.4 12 win_amd64 sm80 FALSE 3.9": ("cu12-sm_80 cu12-sm_86 cu12-sm_89", "torch2.4"),
    "2.15 13 linux_aarch64 sm100 TRUE 3.15": ("cu13-sm_100", "stable"),
    "2.10 13 linux_x86_64 sm120 TRUE 3.10": ("cu13-sm_120", "stable"),
    "2.9 12 linux_aarch64 sm90 TRUE 3.13t": ("cu12-sm_90 cu12-sm_90a", "torch2.9-cxx11abiTRUE"),
}


@pytest.mark.parametrize(("text", "kernels", "shims"), [(k, *v) for k, v in PARTS.items()])
def test_a_cell_is_made_of_few_parts(text: str, kernels: str, shims: str) -> None:
    platform = text.split()[2]
    assert [part.name for part in combination(text).parts()] == [
        *(f"kernels-{name}" for name in kernels.split()),
        f"host-{platform}",
        *(f"shim-{platform}-{name}" for name in shims.split()),
    ]


@pytest.mark.parametrize("platform", MATRIX.facts.platform.values(), ids=lambda x: x.name)
def test_the_universal_wheel_has_all_that_cells_of_its_platform_have(
    platform: matrix_facts.Platform,
) -> None:
    universal = MATRIX.universal(platform)
    assert str(universal.name) == f"flash_attn-2.8.3-py3-none-{platform.tag}.whl"
    assert (universal.root, universal.torch, universal.cuda) == ("whl", None, None)
    cells = [c for c in MATRIX.cells if c.platform is platform and c.archs.name == "all"]
    wanted = {part for cell in cells for part in cell.parts() if not _is_of_other_cuda(part.name)}
    assert set(universal.parts) == wanted


def _is_of_other_cuda(part: str) -> bool:
    return part.startswith("kernels-cu13-")


def test_the_matrix_and_the_builder_agree() -> None:
    for name, torch in MATRIX.facts.torch.items():
        here = native.Torch(matrix_facts.numbers(name), Path(), Path(), True)
        for shim in wheel_parts.shims(MATRIX.facts, torch, MATRIX.facts.kernels_on):
            serves = "stable" if here.is_stable else f"torch{name}"
            assert shim.name.split("-")[2] == serves
        assert Version(torch.release) in Requirement(f"torch=={name}.*").specifier
    for cuda in MATRIX.facts.cuda.values():
        assert matrix_facts.numbers(cuda.toolkit) >= compilers.OLDEST_NVRTC


def test_the_sets_of_architectures_make_up_the_kernel_table() -> None:
    sets = {name: x.has for name, x in MATRIX.facts.archs.items()}
    assert sets.pop("all") == matrix_facts.kernel_archs()
    code = [arch for arch in matrix_facts.kernel_archs() if "ptx" not in arch]
    assert sorted(arch for has in sets.values() for arch in has) == sorted(code)


@pytest.mark.parametrize(
    ("only", "fitting"),
    [
        ([], lambda path: True),
        (["*cu12torch2.8*"], lambda path: "cu12torch2.8" in path),
        (["*-win_amd64.whl"], lambda path: path.endswith("win_amd64.whl")),
        (["whl/flash-attn/*"], lambda path: path.count("/") == 2),
        (["*/torch2.9/sm90/*", "*cp315t*"], lambda path: "torch2.9/sm90/" in path or "15t" in path),
        ([PUBLISHED_NAMES[7]], lambda path: path.endswith(PUBLISHED_NAMES[7])),
    ],
)
def test_only_takes_globs_of_paths_and_names(only: list[str], fitting: object) -> None:
    assert callable(fitting)
    wanted = {path for path in PATHS if fitting(path)}
    assert {wheel.path for wheel in MATRIX.wheels(only)} == wanted
    assert wanted


def test_jobs_are_one_for_each_part_of_kernels_and_each_platform(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["matrix", "--format", "github"]) == 0
    out = capsys.readouterr().out
    plan = json.loads(out)
    assert out.count("\n") == 1  # a step's output is one line
    kernels, platforms = plan["kernels"]["include"], plan["platforms"]["include"]
    assert len(kernels) <= 256
    names = [part.name for part in parts_of(WHEELS) if part.name.startswith("kernels-")]
    assert [job["part"] for job in kernels] == names
    assert len(set(names)) == len(names)
    assert all(set(job) == {"part", "runner", "kind", "arch", "nvrtc"} for job in kernels)
    assert [job["platform"] for job in platforms] == list(MATRIX.facts.platform)
    # Together the jobs of platforms make every wheel, and none twice.
    made = [wheel.path for job in platforms for wheel in MATRIX.wheels([job["wheels"]])]
    assert sorted(made) == sorted(PATHS)


def test_parts_say_what_they_are_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["matrix", "--format", "json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert [part["part"] for part in parts] == [part.name for part in parts_of(WHEELS)]
    assert len({part["part"] for part in parts}) == len(parts)
    fields = {
        "kernels": {"part", "runner", "kind", "arch", "nvrtc"},
        "host": {"part", "runner", "kind", "platform"},
        "shim": {"part", "runner", "kind", "platform", "torch", "cxx11abi"},
    }
    assert all(set(part) == fields[part["kind"]] for part in parts)


def test_more_jobs_than_github_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_report, "MAX_JOBS", 10)
    jobs = len(MATRIX.facts.cuda) * len(matrix_facts.kernel_archs())
    with pytest.raises(MatrixError, match=f"{jobs} jobs; GitHub runs 10"):
        matrix_report.github_text(MATRIX)
    assert matrix_report.github_text(MATRIX, ("*/torch2.9/sm90/*-win_amd64.whl",))


def test_json_tells_of_every_wheel_what_it_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["matrix", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    parts = {part["part"] for part in told["parts"]}
    assert [wheel["path"] for wheel in told["wheels"]] == list(PATHS)
    assert {name for wheel in told["wheels"] for name in wheel["parts"]} == parts


def test_names_are_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["matrix", "--format", "names"]) == 0
    assert capsys.readouterr().out.splitlines() == list(PATHS)


def test_the_table_has_a_row_for_each_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["matrix"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:14]] == list(MATRIX.facts.torch)
    assert lines[-1].startswith(f"{len(WHEELS)} wheels of {len(parts_of(WHEELS))} parts: ")


def test_explain_tells_why_one_wheel_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    name = "flash_attn-2.8.3+cu13torch2.8cxx11abiTRUE-cp314-cp314-linux_x86_64.whl"
    assert main(["matrix", "--explain", "--only", name]) == 0
    out = capsys.readouterr().out
    assert "0 of 1 combinations are cells." in out
    assert "torch 2.8 has no build for CUDA 13 on linux_x86_64; it has 12.6, 12.8, 12.9" in out
    assert "torch 2.8 has no wheel for Python 3.14 on linux_x86_64" in out
    assert "known from: https://" in out


def test_explain_tells_each_reason_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["matrix", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{len(MATRIX.cells)} of {len(MATRIX.combinations)} combinations are cells."
    reasons = [line for line in lines if line.startswith("  ") and "known from" not in line]
    assert len(reasons) == len(set(reasons)) < 60


@pytest.mark.parametrize("option", [[], ["--explain"]])
def test_a_pattern_that_nothing_fits_is_an_error(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["matrix", *option, "--only", "*torch1.13*"]) == 1
    assert "fits *torch1.13*" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('index = "whl"', 'index = "whl', "matrix.toml is no TOML: "),
        ('index = "whl"', "", "outside of any table: 'index' is missing"),
        ('index = "whl"', "index = 3", "outside of any table: 'index' is 3; it must be a text"),
        ('index = "whl"', 'indexes = "whl"', "'indexes' is not known here; do you mean 'index'?"),
        ('toolkit = "12.9"', 'toolkit = "13.8"', "[cuda.12]: 'toolkit' is '13.8'"),
        ('toolkit = "12.9"', 'toolkit = "12.8"', "must pin a release of 12.8"),
        ('release = "2.4.1"', 'release = "2.5.0"', "[torch.2.4]: 'release' is '2.5.0'"),
        ('pythons = ["3.10"', 'pythons = ["3.8"', "[torch.2.9]: 'pythons' has '3.8'; there is 3.9"),
        ('pythons = ["3.10"', "pythons = [3.10", "'pythons' has 3.1; it must be a list of texts"),
        ("cuda.linux_aarch64", "cuda.linux_arm", "[torch.2.4.cuda]: 'linux_arm' is not known"),
        ('has = ["90", "90a"]', 'has = ["91"]', "[archs.sm90]: 'has' has '91'; there is 80, 86"),
        ("120 = ", "121 = ", "[first_toolkit]: '121' is not known here; do you mean '120'?"),
        (
            "{python}",
            "{pythons}",
            "[rules.torch_python]: 'reason' speaks of {pythons}; there is torch",
        ),
        ("{python}", "{python", "[rules.torch_python]: 'reason' is no template"),
        ('sources = ["files"', 'sources = ["file"', "'sources' has 'file'; there is files"),
        ("has_cxx11abi = true", 'has_cxx11abi = "yes"', "is 'yes'; it must be true or false"),
        ('archs = "all"', 'archs = "most"', "[universal]: 'archs' has 'most'; there is all, sm80"),
        ("[rules.torch_gpu]", "[rules.torch_gpus]", "torch_gpu, torch_gpus: a rule needs words"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    text = matrix_facts.FILE.read_text("utf-8")
    assert old in text
    file = tmp_path / "matrix.toml"
    file.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(ValueError, match=r"matrix\.toml|a rule needs") as error:
        Matrix(matrix_facts.load(file))
    assert told in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"matrix\.toml cannot be read: No such file"):
        matrix_facts.load(tmp_path / "matrix.toml")


def test_installing_from_source_never_reads_the_matrix() -> None:
    # It must work on Python 3.9, which has no reader of TOML, and before torch is there.
    program = "import sys, build_tools.backend; assert 'build_tools.matrix' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("kind", ["published", "plain"])
def test_pip_takes_a_wheel_from_an_index(tmp_path: Path, kind: str) -> None:
    """A wheel without contents, but with the name and METADATA of a real one."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_")
    here = [c for c in MATRIX.cells if (c.python, c.platform.name) == (python, platform)]
    here = [cell for cell in here if cell.archs.name == "all"]
    # Not find_spec: setuptools, where it was imported before, warns of that.
    if not here or not any(importlib.metadata.distributions(name="pip")):
        pytest.skip("no cell for this Python here, or no pip")
    wheel = here[-1].published() if kind == "published" else here[-1].plain()
    assert wheel is not None
    project = tmp_path / wheel.root / "flash-attn"
    project.mkdir(parents=True)
    _write(wheel, project / str(wheel.name))
    (project / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>', "utf-8")
    command = [
        sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--no-deps",
        "--ignore-installed", "--disable-pip-version-check", "--report", "-", "--quiet",
        "--index-url", (tmp_path / wheel.root).as_uri(), "flash-attn==2.8.3",
    ]  # fmt: skip
    alone = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
    child = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)["install"][0]["metadata"]
    assert Version(found["version"]) == Version(wheel.name.version)
    assert f"torch=={wheel.torch}.*" in found["requires_dist"]


def _write(wheel: Wheel, file: Path) -> None:
    base = "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\nRequires-Dist: torch>=2.4\n\n"
    info = f"flash_attn-{wheel.name.version}.dist-info"
    marks = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {wheel.name.tag}\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{info}/METADATA", wheel.stamp(base))
        archive.writestr(f"{info}/WHEEL", marks)
        archive.writestr(f"{info}/RECORD", "")
