"""Renders the tables of README.md, docs/ and benchmarks/ from the files that hold the facts.

    python tools/render_docs.py            rewrite the tables in place
    python tools/render_docs.py --check    change nothing; status 1 if a table is out of date

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; NAME is a key of `RENDERERS`. The
truth files are loaded by path, so this runs without torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(?<=<!-- table:)([a-z_]+) -->\n.*?(?=<!-- end -->)", re.DOTALL)


def truth(name: str) -> ModuleType:
    """The truth file flash_attn/NAME.py as a module, without importing the package around it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "flash_attn" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"flash_attn/{name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
            code_list(b.dtypes) if b.features else "-",
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


def bench_table() -> str:
    """One section per result file, newest first."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join(map(bench_section, sorted(results, key=lambda r: r["date"], reverse=True)))


def bench_section(result: dict[str, Any]) -> str:
    """Heading and table of one result file: a line per call, a column per method."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    calls: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        size = f"{row['seqlen']}, {row['heads']} x {row['head_dim']}"
        call = (size, f"`{row['dtype']}`", row["scores"], row["passes"])
        calls.setdefault(call, {})[row["method"]] = row

    def cells(
        by_method: dict[str, dict[str, Any]], field: str, unit: float, form: str
    ) -> list[str]:
        rows = [by_method.get(method) for method in methods]
        return [format(row[field] / unit, form) if row else "-" for row in rows]

    lines = [
        (*call, *cells(rows, "seconds", 1e-3, ".0f"), *cells(rows, "extra_bytes", 2**20, ".0f"))
        for call, rows in calls.items()
    ]
    columns = [f"{method}, {unit}" for unit in ("ms", "MiB") for method in methods]
    header = ("Length, heads x dim", "dtype", "Scores", "Pass", *columns)
    title = f"### {result['device']}, {result['threads']} threads, {result['date']}"
    return f"{title}\n\n{versions}\n\n{table(header, lines)}"


RENDERERS = {
    "env": env_table,
    "backends": backends_table,
    "support": support_table,
    "sdpa": sdpa_table,
    "bench": bench_table,
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
