"""The house rules that a scan of the tree can check: layers, truths, sizes, paths."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flash_attn"
TOP_LEVEL = (
    ROOT / "flash_attn_interface.py",
    ROOT / "flash_attn_2_cuda.py",
    *sorted((ROOT / "flash_attn_3").glob("*.py")),
)
TRUTHS = ("_env.py", "_support.py", "_version.py")

# Rooms of the package from the ground up, as docs/architecture.md draws them: a module imports
# only what stands on a lower line, or its own room. "__init__" is `flash_attn` itself; the
# top-level modules bear a slash.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_env", "_support", "_version"),
    ("_arguments", "_problem", "_rotary", "_flops"),
    ("_checks", "_fakes"),
    ("_cpu", "_registration", "_triton"),
    ("backends",),
    ("_ops",),
    ("_kvcache", "_ops_splits", "_sdpa"),
    ("_ops_fa3",),
    ("_attention",),
    ("_attention_fa3", "/flash_attn_2_cuda"),
    ("flash_attn_interface",),
    ("__init__",),
    ("ops",),
    ("bert_padding", "layers", "losses", "utils"),
    ("flash_attention", "modules"),
    ("_selftest",),
    ("info",),
    ("__main__",),
    ("/flash_attn_interface",),
    ("/flash_attn_3",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

NOT_OURS = {"build", "dist", "__pycache__"}
# What `python -m build_tools` leaves in the package; never committed.
BUILT_FOLDER, BUILT_SUFFIXES = PACKAGE / "kernels", (".so", ".dll")
MAX_BYTES, MAX_PATH, MAX_LINES = 1_000_000, 100, 400


def project_files() -> list[Path]:
    """The files of the project, relative to its root, in a checkout as in an unpacked sdist."""

    def walk(folder: Path) -> Iterator[Path]:
        for path in folder.iterdir():
            if path.is_dir():
                hidden = path.name.startswith(".") and path.name not in (".ci", ".github")
                is_ours = path.name not in NOT_OURS and not path.name.endswith(".egg-info")
                is_ours = is_ours and path != BUILT_FOLDER
                if is_ours and not hidden and not (path / "pyvenv.cfg").exists():
                    yield from walk(path)
            elif path.suffix not in (".pyc", *BUILT_SUFFIXES) and path.name != ".git":
                yield path.relative_to(ROOT)

    return sorted(walk(ROOT))


def python_modules() -> list[Path]:
    return [*sorted(PACKAGE.rglob("*.py")), *TOP_LEVEL]


def room_of(path: Path) -> str:
    if path in TOP_LEVEL:
        return f"/{path.relative_to(ROOT).parts[0].removesuffix('.py')}"
    return path.relative_to(PACKAGE).parts[0].replace(".py", "")


def is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").exists()


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of this project in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute in this project"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if f"/{parts[0]}" in LEVEL:
                yield node.lineno, f"/{parts[0]}"
            elif parts[0] == "flash_attn":
                is_room = len(parts) > 1 and is_module(PACKAGE / parts[1])
                yield node.lineno, parts[1] if is_room else "__init__"


@pytest.mark.parametrize("path", python_modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_imports_only_layers_below(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"{room} has no place in LAYERS"
    upward = [
        f"line {line}: {room} imports {other}"
        for line, other in imported_rooms(path)
        if other != room and LEVEL[other] >= LEVEL[room]
    ]
    assert upward == []


@pytest.mark.parametrize("name", TRUTHS)
def test_truth_file_runs_without_third_party_packages(name: str) -> None:
    # -S leaves out site-packages, -I the current directory: only the standard library is there.
    command = [sys.executable, "-I", "-S", str(PACKAGE / name)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_only_env_touches_the_environment() -> None:
    readers = [
        path.relative_to(ROOT).as_posix()
        for path in python_modules()
        if re.search(r"\benviron\b|\bgetenv\b", path.read_text("utf-8"))
    ]
    assert readers == ["flash_attn/_env.py"]


def test_version_is_the_same_everywhere() -> None:
    version = "2.8.3"
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    assert re.findall(r'^version = "(.*)"$', pyproject, re.MULTILINE) == [version]
    truth = (PACKAGE / "_version.py").read_text("utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', truth, re.MULTILINE) == [version]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_installed_distribution_is_known_by_its_published_name() -> None:
    # transformers and TransformerEngine look the distribution up, not the module.
    assert importlib.metadata.version("flash-attn") == "2.8.3"


def test_tables_agree_with_the_truth_files() -> None:
    command = [sys.executable, str(ROOT / "tools" / "render_docs.py"), "--check"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_no_file_is_large_and_no_path_is_long() -> None:
    too_large = [path for path in project_files() if (ROOT / path).stat().st_size > MAX_BYTES]
    too_long = [path for path in project_files() if len(path.as_posix()) > MAX_PATH]
    assert (too_large, too_long) == ([], [])


def lines_of_logic(path: Path) -> int:
    """Lines of a module without docstrings, and with one line for a signature, however long.

    The published functions have many documented arguments; that does not make a module long.
    """
    text = path.read_text("utf-8")
    lines = len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines -= node.body[0].lineno - node.lineno - 1
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def test_a_module_is_one_room_with_one_job() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): lines_of_logic(path) for path in python_modules()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_no_file_names_a_machine() -> None:
    # Paths of one machine and addresses of one registry; written so as not to match itself.
    pattern = re.compile(
        r"/(?:work|farm|root|home/\w+|tmp/[a-z]\w*|opt/\w+)/|(?:file):///|[p]ypi\.org"
    )
    found = []
    for path in project_files():
        if path.suffix == ".png":
            continue
        for number, line in enumerate((ROOT / path).read_text("utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize("command", ["make demo", "make test", "make lint", "python -m flash_attn"])
def test_readme_shows_the_commands(command: str) -> None:
    assert command in (ROOT / "README.md").read_text("utf-8")
