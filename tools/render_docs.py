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
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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


def results(kind: str) -> list[dict[str, Any]]:
    """The measurements of one kind, newest first; each knows the name of its file."""
    read = [
        {**json.loads(path.read_text("utf-8")), "file": path.name}
        for path in sorted(RESULTS.glob("*.json"))
    ]
    return sorted((r for r in read if r["kind"] == kind), key=lambda r: r["date"], reverse=True)


def sections(kind: str, section: Callable[[dict[str, Any]], str]) -> str:
    """One section per result file."""
    return "\n".join(map(section, results(kind))) or "Nothing has been measured yet.\n"


def bench_table() -> str:
    return sections("cpu", bench_section)


def gpu_table() -> str:
    return sections("gpu", gpu_section)


def peers_table() -> str:
    return sections("peers", peers_section)


def fp8_table() -> str:
    return sections("fp8", fp8_section)


def decode_table() -> str:
    return sections("decode", decode_section)


def training_table() -> str:
    return sections("training", training_section)


def triton_table() -> str:
    return sections("triton", triton_section)


def build_table() -> str:
    return sections("build", build_section)


def install_table() -> str:
    return sections("install", install_section)


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


def gpu_section(result: dict[str, Any]) -> str:
    """Heading, CPU time of a call, and a table of ratios for each dtype and pass."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    kernels = ", ".join(result["kernels"])
    told = f"Driver {result['driver']}, {result['power_limit']}. Kernels: {kernels}."
    parts = [f"### {result['device']}, {result['date']}\n\n{versions}. {told}\n"]
    picture = Path(result["file"]).with_suffix(".png")
    if (RESULTS / picture).exists():
        parts.append(f"![Ratios to SDPA by sequence length](results/{picture})\n")
    return "\n".join([*parts, cpu_table(result), *ratio_tables(result)])


def cpu_table(result: dict[str, Any]) -> str:
    lines = [
        (
            "with gradients to come" if row["gradients"] else "without gradients",
            *(f"{us['median']:.1f} (from {us['min']:.1f})" for us in row["us"].values()),
        )
        for row in result["cpu"]
    ]
    methods = list(result["cpu"][0]["us"])
    return table(("CPU time of a forward call, us", *methods), lines)


def ratio_tables(result: dict[str, Any]) -> Iterator[str]:
    """A heading and a table for each dtype and pass."""
    for kind in dict.fromkeys((row["dtype"], row["passes"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["dtype"], row["passes"]) == kind]
        yield f"**{kind[1]}, `{kind[0]}`**\n\n{ratio_table(rows)}"


def triton_section(result: dict[str, Any]) -> str:
    """Heading, CPU time of a call, ratios to SDPA, and GB/s of the operations beside attention."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    told = f"Driver {result['driver']}, {result['power_limit']}."
    copy = f"A copy: {result['copy_gb_s']:.0f} GB/s."
    methods = list(result["operations"][0]["gb_s"])
    lines = [
        (row["operation"], row["passes"], *(f"{row['gb_s'][m]:.0f}" for m in methods))
        for row in result["operations"]
    ]
    parts = [f"### {result['device']}, {result['date']}\n\n{versions}. {told} {copy}\n"]
    parts += [cpu_table(result), *ratio_tables(result)]
    return "\n".join([*parts, table(("GB/s of", "Pass", *methods), lines)])


def peers_section(result: dict[str, Any]) -> str:
    """Heading, and a table for each pass: ratio to the best peer, TFLOP/s of all."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    told = f"Driver {result['driver']}, {result['power_limit']}."
    parts = [f"### {result['device']}, {result['date']}\n\n{versions}. {told}\n"]
    picture = Path(result["file"]).with_suffix(".png")
    if (RESULTS / picture).exists():
        parts.append(f"![Ratios to the best peer by sequence length](results/{picture})\n")
    methods = list(result["rows"][0]["tflops"])
    for passes in dict.fromkeys(row["passes"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["passes"] == passes]
        mean = math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))
        lines = [
            (
                row["kind"],
                str(row["head_dim"]),
                "causal" if row["causal"] else "full",
                str(row["seqlen"]),
                f"{row['ratio']:.3f}",
                *(f"{row['tflops'][m]:.0f}" if m in row["tflops"] else "-" for m in methods),
            )
            for row in rows
        ]
        header = ("Call", "Head dim", "Mask", "Length", "Ratio", *methods)
        parts.append(f"**{passes}**, geometric mean {mean:.3f}\n\n{table(header, lines)}")
    return "\n".join(parts)


def fp8_section(result: dict[str, Any]) -> str:
    """Heading, TFLOP/s of each method with their ratio, and errors against float64."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    told = f"Driver {result['driver']}, {result['power_limit']}."
    rows = [row for row in result["rows"] if "tflops" in row]
    errors = [row for row in result["rows"] if "error" in row]
    methods = list(rows[0]["tflops"])
    lines = [
        (
            f"{row['heads']}"
            + (f", {row['kv_heads']} of K and V" * (row["kv_heads"] != row["heads"])),
            str(row["head_dim"]),
            "causal" if row["causal"] else "full",
            str(row["seqlen"]),
            f"{row['ratio']:.3f}" if "ratio" in row else "-",
            *(f"{row['tflops'][m]:.0f}" if m in row["tflops"] else "-" for m in methods),
        )
        for row in rows
    ]
    found = [
        (
            row["inputs"],
            "causal" if row["causal"] else "full",
            *(f"{row['error'][m]:.2e}" for m in methods),
        )
        for row in errors
    ]
    return (
        f"### {result['device']}, {result['date']}\n\n{versions}. {told}\n\n"
        + table(("Heads", "Head dim", "Mask", "Length", "Ratio", *methods), lines)
        + "\n"
        + table(("Error: inputs", "Mask", *methods), found)
    )


def decode_section(result: dict[str, Any]) -> str:
    """Heading, and a line for each case: its share of the ceiling, microseconds of all methods."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    told = f"Driver {result['driver']}, {result['power_limit']}."
    mean = math.exp(sum(math.log(row["ratio"]) for row in result["rows"]) / len(result["rows"]))
    methods = list(dict.fromkeys(method for row in result["rows"] for method in row["us"]))
    lines = [
        (
            row["kind"],
            str(row["batch"]),
            str(row["seqlen"]),
            f"{row['of_ceiling']:.3f}",
            f"{row['ratio']:.2f}",
            *(f"{row['us'][m]:.1f}" if m in row["us"] else "-" for m in methods),
        )
        for row in result["rows"]
    ]
    header = ("Call", "Batch", "Keys", "Of the ceiling", "Ratio", *(f"{m}, us" for m in methods))
    ceiling = f"Reading: {result['read_gbps']:.0f} GB/s. Geometric mean of the ratios: {mean:.2f}."
    title = f"### {result['device']}, {result['date']}"
    return f"{title}\n\n{versions}. {told} {ceiling}\n\n{table(header, lines)}"


def training_section(result: dict[str, Any]) -> str:
    """Heading, and a line for each method: a step's time, the loss, how far it is from SDPA's."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [f"### {result['device']}, {result['date']}\n\n{versions}.\n"]
    picture = Path(result["file"]).with_suffix(".png")
    if (RESULTS / picture).exists():
        parts.append(f"![Loss by step, and time of a step](results/{picture})\n")
    base = result["rows"][1]
    lines = [
        (
            row["method"],
            f"{row['step_ms']:.1f}",
            f"{row['losses'][0]:.3f}",
            f"{row['losses'][-1]:.3f}",
            f"{max(abs(x - y) for x, y in zip(row['losses'], base['losses'])):.4f}",
        )
        for row in result["rows"]
    ]
    header = ("Attention", "Step, ms", "First loss", "Last loss", f"Most from {base['method']}")
    return "\n".join([*parts, table(header, lines)])


def ratio_table(rows: list[dict[str, Any]]) -> str:
    """A line per head dim and mask, a column per length."""
    seqlens = sorted({row["seqlen"] for row in rows})
    lines: dict[tuple[int, bool], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["seqlen"]):
        ratio, tflops = row["ratio"], next(iter(row["tflops"].values()))
        spread = (ratio["max"] - ratio["min"]) / 2
        cell = f"{ratio['median']:.2f} ±{spread:.2f} ({tflops:.0f})"
        lines.setdefault((row["head_dim"], row["causal"]), []).append(cell)
    return table(
        ("Head dim", "Mask", *map(str, seqlens)),
        [(str(d), "causal" if causal else "full", *cells) for (d, causal), cells in lines.items()],
    )


def build_section(result: dict[str, Any]) -> str:
    """What a build cost, and a line for each kernel: the larger figure of its two dtypes."""
    rows, seconds = result["rows"], result["seconds"]
    total = (
        f"{len(rows)} kernels for `sm_{result['arch']}` in {seconds['kernels']:.0f} s with "
        f"{result['jobs']} compilers at a time, at most {max(r['peak_mb'] for r in rows)} MB each, "
        f"{sum(r['code_bytes'] for r in rows) / 1e6:.1f} MB of code. Host library: "
        f"{seconds['host library']:.1f} s; shim: {seconds['shim']:.1f} s."
    )
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kernels.setdefault(row["kernel"].rsplit("_", 1)[0], []).append(row)
    lines = [
        (
            f"`{name}`",
            *(str(max(r[field] for r in same)) for field in ("registers", "stack")),
            str(max(r["spill_stores"] + r["spill_loads"] for r in same)),
            *(str(max(r[field] for r in same)) for field in ("seconds", "peak_mb")),
            f"{max(r['code_bytes'] for r in same) / 1024:.0f}",
        )
        for name, same in kernels.items()
    ]
    header = ("Kernel", "registers", "stack", "spilled bytes", "seconds", "peak MB", "KB")
    title = f"### {result['device']}, {result['compiler']}, {result['date']}"
    return f"{title}\n\n{total}\n\n{table(header, lines)}"


def install_section(result: dict[str, Any]) -> str:
    """A line for each way to install."""
    lines = [
        (
            row["way"],
            *(f"{row[f'{step}_seconds']:.1f}" for step in ("install", "call")),
            f"{row['install_seconds'] + row['call_seconds']:.1f}",
            f"{row['peak_mb']:.0f}",
        )
        for row in result["rows"]
    ]
    header = ("Way", "install, s", "first call, s", "together, s", "peak MB")
    title = f"### {result['device']}, {result['cores']} cores, {result['date']}"
    size = f"`{result['wheel']}`: {result['wheel_bytes'] / 1e6:.1f} MB. Python {result['python']}."
    return f"{title}\n\n{size}\n\n{table(header, lines)}"


def environments_table() -> str:
    return sections("environments", environments_section)


def environments_section(result: dict[str, Any]) -> str:
    """A line for each torch that a wheel was installed beside, more where Pythons differ."""
    same: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        shim = f"`{row['shim']}`" if not row["not_loaded"] else row["not_loaded"]
        checks = f"{row['passed']} of {row['checks']}"
        gpus = ", ".join(row["gpus"]) or "none"
        same.setdefault((row["torch"], row["cxx11abi"], shim, gpus, checks), []).append(row)
    lines = [
        (
            torch,
            ", ".join(row["python"] for row in rows),
            *told,
            f"{max(row['error'] for row in rows):.0e}",
            checks,
        )
        for (torch, *told, checks), rows in same.items()
    ]
    header = ("torch", "Python", "cxx11abi", "Shim loaded", "GPUs", "Error", "Self-tests passed")
    title = f"`{result['wheel']}`, {result['bytes'] / 1e6:.1f} MB, {result['date']}:"
    return f"{title}\n\n{table(header, lines)}"


def matrix_table(kind: str) -> str:
    """A table of the wheel matrix."""
    from build_tools import matrix, matrix_report

    return table(*getattr(matrix_report, kind)(matrix.Matrix()))


RENDERERS = {
    "env": env_table,
    "backends": backends_table,
    "support": support_table,
    "sdpa": sdpa_table,
    "kernels": kernels_table,
    "build_variables": build_variables_table,
    "bench": bench_table,
    "gpu": gpu_table,
    "peers": peers_table,
    "fp8": fp8_table,
    "decode": decode_table,
    "training": training_table,
    "triton": triton_table,
    "build": build_table,
    "install": install_table,
    "environments": environments_table,
    "matrix": lambda: matrix_table("support_table"),
    "matrix_archs": lambda: matrix_table("archs_table"),
    "matrix_rules": lambda: matrix_table("rules_table"),
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
