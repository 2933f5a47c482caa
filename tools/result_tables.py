"""Tables of benchmarks/results: a section for each measurement, by its kind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results(kind: str) -> list[dict[str, Any]]:
    """The measurements of one kind, newest first; each knows the name of its file."""
    read = [
        {**json.loads(path.read_text("utf-8")), "file": path.name}
        for path in sorted(RESULTS.glob("*.json"))
    ]
    return sorted((r for r in read if r["kind"] == kind), key=lambda r: r["date"], reverse=True)


def sections(kind: str) -> str:
    """One section per result file."""
    return "\n".join(map(SECTIONS[kind], results(kind))) or "Nothing has been measured yet.\n"


def versions_of(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def heading(result: dict[str, Any], *told: str) -> str:
    """Of a GPU's section: where and when, with what, on what."""
    driver = f"Driver {result['driver']}, {result['power_limit']}."
    sentences = " ".join([f"{versions_of(result)}.", driver, *told])
    return f"### {result['device']}, {result['date']}\n\n{sentences}\n"


def picture(result: dict[str, Any], title: str) -> list[str]:
    """The one drawn beside a result, where there is one."""
    path = Path(result["file"]).with_suffix(".png")
    return [f"![{title}](results/{path})\n"] if (RESULTS / path).exists() else []


def mask(row: dict[str, Any]) -> str:
    return "causal" if row["causal"] else "full"


def heads_of(row: dict[str, Any]) -> str:
    return f"{row['heads']} of {row['kv_heads']}"


def methods_of(rows: list[dict[str, Any]]) -> list[str]:
    """All that took a case of some."""
    return list(dict.fromkeys(method for row in rows for method in row["us"]))


def microseconds(row: dict[str, Any], methods: list[str]) -> list[str]:
    """Of each method, or what stands for none."""
    return [f"{row['us'][m]:.1f}" if m in row["us"] else "-" for m in methods]


def rates(row: dict[str, Any], methods: list[str]) -> list[str]:
    """TFLOP/s of each method, or what stands for none."""
    return [f"{row['tflops'][m]:.0f}" if m in row["tflops"] else "-" for m in methods]


def mean_ratio(rows: list[dict[str, Any]]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))


def bench_section(result: dict[str, Any]) -> str:
    """Heading and table of one result file: a line per call, a column per method."""
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
    return f"{title}\n\n{versions_of(result)}\n\n{table(header, lines)}"


def gpu_section(result: dict[str, Any]) -> str:
    """Heading, CPU time of a call, and a table of ratios for each dtype and pass."""
    parts = [heading(result, f"Kernels: {', '.join(result['kernels'])}.")]
    parts += picture(result, "Ratios to SDPA by sequence length")
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
    methods = list(result["operations"][0]["gb_s"])
    lines = [
        (row["operation"], row["passes"], *(f"{row['gb_s'][m]:.0f}" for m in methods))
        for row in result["operations"]
    ]
    parts = [heading(result, f"A copy: {result['copy_gb_s']:.0f} GB/s."), cpu_table(result)]
    parts += ratio_tables(result)
    return "\n".join([*parts, table(("GB/s of", "Pass", *methods), lines)])


def peers_section(result: dict[str, Any]) -> str:
    """Heading, a table for each pass, errors, what hard inputs cost, and what one order does."""
    _, *others = result["rows"][0]["tflops"]
    parts = [heading(result, f"Beside {', '.join(others)}.")]
    parts += picture(result, "Ratios to the best peer by sequence length")
    parts += [cpu_table(result)] if "cpu" in result else []
    for passes in dict.fromkeys(row["passes"] for row in result["rows"]):
        parts.append(passes_table([row for row in result["rows"] if row["passes"] == passes]))
    parts += [errors_table(result["accuracy"])] if "accuracy" in result else []
    parts += [hard_table(result["hard"])] if "hard" in result else []
    parts += [order_table(result["deterministic"])] if "deterministic" in result else []
    return "\n".join(parts)


def passes_table(rows: list[dict[str, Any]]) -> str:
    """Of one pass: ratio to the best peer, TFLOP/s of all."""
    methods = list(rows[0]["tflops"])
    lines = [
        (
            row["kind"],
            str(row["head_dim"]),
            mask(row),
            str(row["seqlen"]),
            f"{row['ratio']:.3f}",
            *rates(row, methods),
        )
        for row in rows
    ]
    header = ("Call", "Head dim", "Mask", "Length", "Ratio", *methods)
    title = f"**{rows[0]['passes']}**, geometric mean {mean_ratio(rows):.3f}"
    return f"{title}\n\n{table(header, lines)}"


def errors_table(rows: list[dict[str, Any]]) -> str:
    """Our error of each result, and in brackets how many times the peer's it is."""
    ours, peer = list(rows[0]["error"])[:2]
    names = list(rows[0]["error"][ours])
    lines = [
        (
            row["inputs"],
            str(row["head_dim"]),
            mask(row),
            *(
                f"{row['error'][ours][name]:.2e} "
                f"({row['error'][ours][name] / row['error'][peer][name]:.3f})"
                for name in names
            ),
        )
        for row in rows
    ]
    title = f"**Errors** of `{ours}`, and in brackets as parts of those of {peer}"
    return f"{title}\n\n{table(('Inputs', 'Head dim', 'Mask', *names), lines)}"


def hard_table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of inputs and head dim, a column for each method."""
    lines = [
        (row["inputs"], str(row["head_dim"]), *slower(row))
        for row in rows
        if row["inputs"] != "normal"
    ]
    title = "**Hard inputs**: time of a forward call over that of normal inputs"
    return f"{title}\n\n{table(('Inputs', 'Head dim', *rows[0]['slower']), lines)}"


def order_table(rows: list[dict[str, Any]]) -> str:
    """A line for each call, a column for each method."""
    lines = [(str(row["head_dim"]), mask(row), str(row["seqlen"]), *slower(row)) for row in rows]
    title = "**Deterministic**: time of a backward call with `deterministic=True` over that without"
    return f"{title}\n\n{table(('Head dim', 'Mask', 'Length', *rows[0]['slower']), lines)}"


def slower(row: dict[str, Any]) -> list[str]:
    """Of each method the time over its usual one."""
    return [f"{times:.3f}" for times in row["slower"].values()]


def fp8_section(result: dict[str, Any]) -> str:
    """Heading, TFLOP/s of each method with their ratio, and errors against float64."""
    rows = [row for row in result["rows"] if "tflops" in row]
    methods = list(rows[0]["tflops"])
    lines = [
        (
            f"{row['heads']}"
            + (f", {row['kv_heads']} of K and V" * (row["kv_heads"] != row["heads"])),
            str(row["head_dim"]),
            mask(row),
            str(row["seqlen"]),
            f"{row['ratio']:.3f}" if "ratio" in row else "-",
            *rates(row, methods),
        )
        for row in rows
    ]
    errors = [
        (row["inputs"], mask(row), *(f"{row['error'][m]:.2e}" for m in methods))
        for row in result["rows"]
        if "error" in row
    ]
    speed = table(("Heads", "Head dim", "Mask", "Length", "Ratio", *methods), lines)
    return "\n".join([heading(result), speed, table(("Error: inputs", "Mask", *methods), errors)])


def decode_section(result: dict[str, Any]) -> str:
    """Heading, and a line for each case: its share of the ceiling, microseconds of all methods."""
    mean = f"Geometric mean of the ratios: {mean_ratio(result['rows']):.2f}."
    methods = methods_of(result["rows"])
    lines = [
        (
            row["kind"],
            str(row["batch"]),
            str(row["seqlen"]),
            f"{row['of_ceiling']:.3f}",
            f"{row['ratio']:.2f}",
            *microseconds(row, methods),
        )
        for row in result["rows"]
    ]
    header = ("Call", "Batch", "Keys", "Of the ceiling", "Ratio", *(f"{m}, us" for m in methods))
    parts = [heading(result, f"Reading: {result['read_gbps']:.0f} GB/s. {mean}")]
    parts.append(table(header, lines))
    parts += [chunks_table(result["chunks"])] if "chunks" in result else []
    parts += [mixed_table(result["mixed"])] if "mixed" in result else []
    parts += [layers_table(result["layers"])] if "layers" in result else []
    parts += [latent_table(result["latent"])] if result.get("latent") else []
    return "\n".join(parts)


def chunks_table(rows: list[dict[str, Any]]) -> str:
    """TFLOP/s of all methods, and in brackets microseconds."""
    methods = methods_of(rows)
    lines = [
        (
            heads_of(row),
            str(row["head_dim"]),
            str(row["queries"]),
            f"{row['seqlen']}, pages of {row['page']}" if row["page"] else str(row["seqlen"]),
            f"{row['ratio']:.2f}",
            *(f"{row['tflops'][m]:.0f} ({row['us'][m]:.1f})" for m in methods),
        )
        for row in rows
    ]
    title = f"**Chunks**, TFLOP/s, and in brackets us; geometric mean {mean_ratio(rows):.2f}"
    header = ("Heads", "Head dim", "Queries", "Keys", "Ratio", *methods)
    return f"{title}\n\n{table(header, lines)}"


def mixed_table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of batch and number of heads."""
    methods = methods_of(rows)
    lines = [
        (
            row["kind"],
            heads_of(row),
            f"{row['of_ceiling']:.3f}",
            f"{row['ratio']:.2f}",
            *microseconds(row, methods),
        )
        for row in rows
    ]
    title = f"**Mixed batches**, us; geometric mean {mean_ratio(rows):.2f}"
    header = ("Sequences", "Heads", "Of the ceiling", "Ratio", *methods)
    return f"{title}\n\n{table(header, lines)}"


def layers_table(rows: list[dict[str, Any]]) -> str:
    """The graph of all layers of a step, and in brackets what a call costs the CPU."""
    methods = list(rows[0]["us"])
    lines = [
        (
            str(row["batch"]),
            str(row["seqlen"]),
            f"{row['ratio']:.2f}",
            *(f"{row['us'][m] * row['layers']:.0f} ({row['cpu_us'][m]:.1f})" for m in methods),
        )
        for row in rows
    ]
    title = f"**{rows[0]['layers']} layers in a graph**, us, and in brackets the CPU's for a call"
    return f"{title}\n\n{table(('Batch', 'Keys', 'Ratio', *methods), lines)}"


def latent_table(rows: list[dict[str, Any]]) -> str:
    """GB/s and TFLOP/s of the first method, microseconds of all."""
    methods = methods_of(rows)
    lines = [
        (
            row["kind"],
            str(row["heads"]),
            str(row["batch"]),
            str(row["seqlen"]),
            f"{row['gbps'][methods[0]]:.0f}",
            f"{row['tflops'][methods[0]]:.0f}",
            f"{row['ratio']:.2f}",
            *microseconds(row, methods),
        )
        for row in rows
    ]
    title = f"**Latent attention**, us; geometric mean {mean_ratio(rows):.2f}"
    header = ("Call", "Heads", "Batch", "Keys", "GB/s", "TFLOP/s", "Ratio", *methods)
    return f"{title}\n\n{table(header, lines)}"


def training_section(result: dict[str, Any]) -> str:
    """Heading, and a line for each method: a step's time, the loss, how far it is from SDPA's."""
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
    parts = [heading(result), *picture(result, "Loss by step, and time of a step")]
    return "\n".join([*parts, table(header, lines)])


def ratio_table(rows: list[dict[str, Any]]) -> str:
    """A line per head dim and mask, a column per length."""
    seqlens = sorted({row["seqlen"] for row in rows})
    lines: dict[tuple[int, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["seqlen"]):
        ratio, tflops = row["ratio"], next(iter(row["tflops"].values()))
        spread = (ratio["max"] - ratio["min"]) / 2
        cell = f"{ratio['median']:.2f} ±{spread:.2f} ({tflops:.0f})"
        lines.setdefault((row["head_dim"], mask(row)), []).append(cell)
    return table(
        ("Head dim", "Mask", *map(str, seqlens)),
        [(str(d), name, *cells) for (d, name), cells in lines.items()],
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


SECTIONS = {
    "cpu": bench_section,
    "gpu": gpu_section,
    "under_sdpa": gpu_section,
    "peers": peers_section,
    "fp8": fp8_section,
    "decode": decode_section,
    "training": training_section,
    "triton": triton_section,
    "build": build_section,
    "install": install_section,
    "environments": environments_section,
}
