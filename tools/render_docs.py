"""Renders the tables of README.md, docs/ and benchmarks/ from the files that hold the facts.

    python tools/render_docs.py            rewrite the tables in place
    python tools/render_docs.py --check    change nothing; status 1 if a table is out of date

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; NAME is a key of `RENDERERS`. The
truth files are loaded by path, so this runs without torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType

from result_tables import SECTIONS, sections, table
from speed_table import speed_table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BLOCK = re.compile(r"(?<=<!-- table:)([a-z0-9_]+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def truth(name: str) -> ModuleType:
    """The truth file flash_attn/NAME.py as a module, without importing the package around it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "flash_attn" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"flash_attn/{name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def code_list(words: Iterable[str]) -> str:
    """`a`, `b`, `c`."""
    return ", ".join(f"`{word}`" for word in words)


def yes(value: bool) -> str:
    return "yes" if value else "-"


def env_table() -> str:
    rows = [
        (f"`{v.name}`", code_list(v.choices), default_cell(v.default_text), v.doc)
        for v in truth("_env").VARIABLES
    ]
    return table(("Variable", "Values", "Default", "Meaning"), rows)


def default_cell(text: str) -> str:
    return text if text == "unset" else f"`{text}`"


def backends_table() -> str:
    rows = [
        (
            f"`{b.name}`",
            ", ".join(b.device_types),
            code_list(b.dtypes),
            b.note,
        )
        for b in truth("_support").BACKENDS
    ]
    return table(("Backend", "Tensors on", "dtypes of q, k, v", "State"), rows)


def support_table() -> str:
    support = truth("_support")
    rows = [
        (feature.title, *(yes(feature.name in b.features) for b in support.BACKENDS))
        for feature in support.FEATURES
    ]
    return table(("Feature", *(f"`{b.name}`" for b in support.BACKENDS)), rows)


def sdpa_table() -> str:
    support = truth("_support")
    rows = [
        (
            feature.title,
            yes(any(feature.name in b.features for b in support.BACKENDS)),
            yes(feature.in_sdpa),
        )
        for feature in support.FEATURES
    ]
    return table(("Feature", "flash_attn", "PyTorch SDPA"), rows)


def kernels_table() -> str:
    """The kernels of the table, by family."""
    rows = [
        (
            f"`{family.name}`",
            code_list(family.kinds),
            ", ".join(map(str, family.head_dims)) or "any",
            code_list(family.dtypes),
            code_list(family.archs),
        )
        for family in truth("_support").KERNEL_FAMILIES
    ]
    return table(("Family", "Kernels", "Head dims", "dtypes", "Architectures"), rows)


def build_variables_table() -> str:
    rows = [
        (" or ".join(f"`{name}`" for name in (v.name, *v.aliases)), v.doc)
        for v in truth("_env").BUILD_VARIABLES
    ]
    return table(("Variable", "Meaning"), rows)


def matrix_table(kind: str) -> str:
    """A table of the wheel matrix."""
    from build_tools import matrix, matrix_report

    return table(*getattr(matrix_report, kind)(matrix.Matrix()))


RENDERERS: dict[str, Callable[[], str]] = {
    "env": env_table,
    "backends": backends_table,
    "support": support_table,
    "sdpa": sdpa_table,
    "kernels": kernels_table,
    "speed": speed_table,
    "build_variables": build_variables_table,
    **{kind: partial(sections, kind) for kind in SECTIONS},
    "matrix": partial(matrix_table, "support_table"),
    "matrix_archs": partial(matrix_table, "archs_table"),
    "matrix_rules": partial(matrix_table, "rules_table"),
}


def render(text: str) -> str:
    """`text` with every marked table made anew."""
    return BLOCK.sub(lambda m: f"{m[1]} -->\n\n{RENDERERS[m[1]]()}\n", text)


def documents() -> list[Path]:
    """The Markdown files that may hold tables."""
    return [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, tell what differs")
    check = parser.parse_args().check
    stale = []
    for path in documents():
        text = path.read_text("utf-8")
        rendered = render(text)
        if rendered == text:
            continue
        stale.append(path.relative_to(ROOT).as_posix())
        if not check:
            path.write_text(rendered, "utf-8")
    if stale and check:
        print(f"out of date: {', '.join(stale)}", file=sys.stderr)
        print("hint: python tools/render_docs.py", file=sys.stderr)
        return 1
    if stale:
        print(f"rewritten: {', '.join(stale)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
