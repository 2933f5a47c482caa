"""The README's table of speed: every measurement against others, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from result_tables import mean_ratio, methods_of, results, table

Row = dict[str, Any]
PASSES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}
PARTS = {
    "rows": "a query over a cache",
    "chunks": "chunks of a prompt over a cache",
    "mixed": "batches of a server, chunks beside queries",
    "latent": "a query over a latent",
}


def speed_table() -> str:
    """A line for each kind of call on each GPU: its ratios to the best of the others."""
    lines = [
        (
            device_of(result),
            call,
            ", ".join(dict.fromkeys(other.removesuffix(", planned") for other in others)),
            f"{mean_ratio(rows):.2f}",
            f"{min(row['ratio'] for row in rows):.2f} to {max(row['ratio'] for row in rows):.2f}",
            str(len(rows)),
        )
        for result, call, others, rows in measured()
    ]
    header = ("GPU", "Calls", "Against the best of", "Ratio", "From, to", "Points")
    return table(header, sorted(lines, key=lambda line: line[0]))


def device_of(result: Row) -> str:
    """Its name less its maker, and the memory that all of its kind have."""
    return str(result["device"]).replace("NVIDIA ", "").split(" 80GB")[0]


def measured() -> Iterator[tuple[Row, str, list[str], list[Row]]]:
    """(result, calls, others, rows with a ratio)."""
    for result in results("peers"):
        for passes, call in PASSES.items():
            rows = [row for row in result["rows"] if row["passes"] == passes]
            yield result, call, list(rows[0]["tflops"])[1:], rows
    for result in results("fp8"):
        rows = [row for row in result["rows"] if row.get("ratio")]
        yield result, "forward, FP8", list(rows[0]["tflops"])[1:], rows
    for result in results("decode"):
        for part, call in PARTS.items():
            if result.get(part):
                yield result, call, methods_of(result[part])[1:], result[part]
    for result in results("under_sdpa"):
        for passes, call in PASSES.items():
            rows = [
                {"ratio": row["ratio"]["median"]}
                for row in result["rows"]
                if row["passes"] == passes
            ]
            yield result, f"{call}, through SDPA", ["what torch chooses"], rows
