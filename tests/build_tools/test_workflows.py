"""Workflows: what they call exists, what they use is pinned, they may do what they must alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from build_tools import matrix_report
from build_tools.__main__ import parser
from build_tools.make_parts import STORE
from build_tools.matrix import Matrix
from build_tools.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

FOLDER = ROOT / ".github" / "workflows"
NAMES = ("ci.yml", "gpu.yml", "release.yml", "wheels.yml")
PINNED = re.compile(r"uses: [\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
# What a job may do besides reading the sources, and nothing else may.
ALLOWED = {
    ("release.yml", "attest"): {"id-token": "write", "attestations": "write"},
    ("release.yml", "publish"): {"id-token": "write", "pages": "write"},
    ("release.yml", "files"): {"contents": "write"},
}
FACTORY = "build/factory/bin/python"
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}")

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="an sdist carries no workflows")


@cache
def workflow(name: str) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    return made


def pyproject() -> dict[str, Any]:
    made: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return made


def jobs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name in NAMES:
        for key, job in workflow(name)["jobs"].items():
            yield name, key, job


def steps() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, key, job in jobs():
        for step in job.get("steps", ()):
            yield f"{name}: {key}", job, step


def commands() -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(place, words, environment) of each command that a step runs."""
    for place, _, step in steps():
        for line in step.get("run", "").replace("\\\n", " ").splitlines():
            inner = re.search(r"\$\((.*)\)", line)
            words = shlex.split(inner.group(1) if inner else line)
            yield place, words, step.get("env", {})


def test_these_are_all_the_workflows() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_workflow_has_triggers_and_every_job_a_time_limit(name: str) -> None:
    # In YAML 1.1 the key `on` is a truth value.
    assert set(workflow(name)) >= {"name", True, "permissions", "jobs"}
    assert set(workflow(name)) <= {"name", True, "permissions", "jobs", "concurrency"}
    for job in workflow(name)["jobs"].values():
        assert "uses" in job or (job["runs-on"] and job["timeout-minutes"] <= 120)


@pytest.mark.parametrize("name", NAMES)
def test_every_action_is_pinned_by_a_commit_and_says_its_version(name: str) -> None:
    lines = (FOLDER / name).read_text("utf-8").splitlines()
    used = [line.strip().removeprefix("- ") for line in lines if re.search(r"^\s*-?\s*uses:", line)]
    own = [line for line in used if line.startswith("uses: ./")]
    assert [line for line in used if line not in own and not PINNED.match(line)] == []
    for line in own:
        assert (ROOT / line.split()[1]).exists()


def test_an_action_is_one_commit_everywhere() -> None:
    found: dict[str, set[str]] = {}
    for _, _, step in steps():
        action, _, commit = step.get("uses", "").partition("@")
        found.setdefault(action, set()).add(commit)
    assert {action: commits for action, commits in found.items() if len(commits) > 1} == {}


def test_permissions_are_no_more_than_each_job_needs() -> None:
    assert [workflow(name)["permissions"] for name in NAMES] == [{"contents": "read"}] * len(NAMES)
    found = {(name, key): job["permissions"] for name, key, job in jobs() if "permissions" in job}
    assert found == ALLOWED


def test_nothing_stored_is_used_and_no_checkout_keeps_its_token() -> None:
    for name in NAMES:
        assert "secrets" not in (FOLDER / name).read_text("utf-8")
    for place, _, step in steps():
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}, place


def test_no_expression_stands_in_a_command() -> None:
    # A value would become part of the program; a variable stays one word.
    assert [place for place, _, step in steps() if EXPRESSION.search(step.get("run", ""))] == []


def test_what_may_not_be_trusted_never_runs_on_own_machines() -> None:
    own = {name for name, _, job in jobs() if "self-hosted" in job.get("runs-on", "")}
    assert own == {"gpu.yml"}
    assert workflow("gpu.yml")[True] == {"workflow_dispatch": None}
    known = yaml.safe_load((ROOT / ".github" / "actionlint.yaml").read_text("utf-8"))
    label = workflow("gpu.yml")["jobs"]["test"]["runs-on"][-1]
    assert known["self-hosted-runner"]["labels"] == [label]


def make_targets() -> set[str]:
    return set(
        re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    )


def test_every_make_target_that_is_called_exists() -> None:
    rows = workflow("ci.yml")["jobs"]["check"]["strategy"]["matrix"]["include"]
    called = {word for row in rows for word in row["target"].split()}
    for _, words, env in commands():
        if words[0] == "make" and words[1] == "$TARGET":
            assert env["TARGET"] == "${{ matrix.target }}"
        elif words[0] == "make":
            called.update(words[1:])
    assert called == {"lint", "test", "test-gpu", "factory", "wheels-container"}
    assert called <= make_targets()


def test_every_command_of_the_factory_is_understood() -> None:
    asked = []
    for _, words, env in commands():
        if "build_tools" not in words:
            continue
        assert words[:3] in ([FACTORY, "-m", "build_tools"], ["python", "-m", "build_tools"])
        assert all(word[1:] in env for word in words if word.startswith("$"))
        asked.append(parser().parse_args(words[3:]).command)
    assert set(asked) == {"matrix", "part", "build", "audit", "mirror", "verify", "stand-in"}


@pytest.mark.parametrize("name", ["wheels.yml", "release.yml"])
def test_the_factory_is_made_before_it_is_used(name: str) -> None:
    for job in workflow(name)["jobs"].values():
        lines = [line for step in job.get("steps", ()) for line in step.get("run", "").splitlines()]
        first = [i for i, line in enumerate(lines) if FACTORY in line]
        makes = [
            i for i, line in enumerate(lines) if line in ("make factory", "make wheels-container")
        ]
        assert not first or makes[0] < first[0]


def plan() -> dict[str, Any]:
    """The plan, by the options that the workflow gives."""
    [words] = [words for _, words, _ in commands() if "matrix" in words]
    only = parser().parse_args(words[3:]).only
    made: dict[str, Any] = json.loads(matrix_report.github_text(Matrix(), tuple(only)))
    return made


def test_the_plan_holds_what_the_jobs_read() -> None:
    read: dict[str, set[str]] = {}
    for key, job in workflow("wheels.yml")["jobs"].items():
        text = json.dumps(job)
        source = job.get("strategy", {}).get("matrix", "")
        if not source:
            assert "matrix." not in text
            continue
        found = re.fullmatch(r"\$\{\{ fromJSON\(needs\.plan\.outputs\.plan\)\.(\w+) \}\}", source)
        assert found is not None, key
        read[found.group(1)] = set(re.findall(r"matrix\.(\w+)", text))
    made = plan()
    assert set(read) == set(made)
    for axis, fields in read.items():
        rows = made[axis]["include"]
        assert rows
        assert all(fields <= set(row) for row in rows)


def test_the_plan_is_of_platforms_whose_parts_can_be_made() -> None:
    platforms = {row["platform"] for row in plan()["platforms"]["include"]}
    assert platforms == {"linux_x86_64", "linux_aarch64"}
    archs = {identifier.partition("-manylinux_")[2] for identifier in cibuildwheel()["build"]}
    assert {f"linux_{arch}" for arch in archs} == platforms


@pytest.mark.parametrize("platform", ["x86_64", "aarch64"])
def test_the_audit_reads_a_wheel_of_every_kind_torch_and_cuda(
    tmp_path: Path, platform: str
) -> None:
    made = [wheel.path for wheel in Matrix().wheels([f"*{platform}.whl"])]
    for path in made:
        file = tmp_path / "dist" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    [words] = [words for _, words, _ in commands() if "audit" in words]
    read = [
        {file.relative_to(tmp_path / "dist").as_posix() for file in tmp_path.glob(pattern)}
        for pattern in words[words.index("audit") + 1 :]
    ]
    assert all(read), "a pattern of nothing would be taken for the name of a file"

    def without_python(paths: Iterable[str]) -> set[str]:
        return {re.sub(r"-cp\d+-cp\d+t?-", "-", path) for path in paths}

    assert without_python(made) == without_python(set().union(*read))


def test_files_go_from_job_to_job_under_names_that_are_given_and_taken() -> None:
    given = [
        EXPRESSION.sub("*", step["with"]["name"])
        for _, _, step in steps()
        if step.get("uses", "").startswith("actions/upload-artifact@")
    ]
    assert given == ["source", "*", "wheels-*", "published-names-*"]
    kernels = {row["part"] for row in plan()["kernels"]["include"]}
    assert all(part.startswith("kernels-") for part in kernels)
    taken = {
        pattern
        for _, _, step in steps()
        if step.get("uses", "").startswith("actions/download-artifact@")
        for pattern in step["with"]["pattern"].strip("{}").split(",")
    }
    assert taken == {"kernels-*", "wheels-*", "published-names-*", "source"}


def cibuildwheel() -> dict[str, Any]:
    made: dict[str, Any] = pyproject()["tool"]["cibuildwheel"]
    return made


def test_cibuildwheel_asks_the_backend_for_the_universal_wheel() -> None:
    settings = cibuildwheel()["config-settings"]
    assert [ROOT / place for place in settings.values()] == [STORE]
    # In a process of its own: setuptools changes the one that imports it.
    program = (
        "import json, sys\nfrom build_tools import backend\n"
        "print(json.dumps(backend.get_requires_for_build_wheel(json.loads(sys.argv[1]))))\n"
        "print(backend.is_of_parts(None), backend.is_of_parts({backend.SETTING: 'true'}))"
    )
    command = [sys.executable, "-c", program, json.dumps(settings)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    wanted, others = child.stdout.splitlines()
    # No torch, as for other builds, and pip, which brings what parts are made with.
    assert [word.partition(";")[0] for word in json.loads(wanted)] == ["ninja", "pip", "tomli"]
    assert others == "False False"
    script = (ROOT / "tools" / "wheels_container.sh").read_text("utf-8")
    assert f":/project/{settings['parts']}" in script
    for arch in ("x86_64", "aarch64"):
        assert cibuildwheel()[f"manylinux-{arch}-image"] == "manylinux_2_28"


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_cibuildwheel_understands_its_configuration(arch: str) -> None:
    pytest.importorskip("cibuildwheel")
    command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--archs", arch]
    command += ["--print-build-identifiers", str(ROOT)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [f"cp312-manylinux_{arch}"]


def test_cibuildwheel_refuses_an_option_that_it_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("cibuildwheel")
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert "\nconfig-settings = " in text
    (tmp_path / "pyproject.toml").write_text(text.replace("\nconfig-settings", "\nsettings"))
    command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux"]
    command += ["--print-build-identifiers", str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode != 0
    assert "settings" in child.stdout + child.stderr


def test_the_run_in_a_container_made_a_wheel_that_the_audit_takes() -> None:
    logs = sorted((ROOT / "benchmarks" / "results").glob("*-wheels-container.log"))
    text = logs[-1].read_text("utf-8")
    assert logs[-1].stat().st_size < 200_000
    assert f"-Cparts={cibuildwheel()['config-settings']['parts']}" in text
    assert re.search(r"^1 wheel produced in ", text, re.MULTILINE)
    assert re.search(r"^1 wheels: \d+ ok, \d+ skipped, 0 BROKEN$", text, re.MULTILINE)
