"""Pictures: time and memory, or a GPU's ratios to others, against sequence length; training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from measure import Case, Result

COLORS = {"flash_attn": "#0b6e8f", "standard": "#c2571a"}
STYLES = {"fwd": "-", "fwd+bwd": "--"}
LINES = ("-", "--", ":", "-.")
HEAD_DIM_COLORS = {64: "#0b6e8f", 128: "#c2571a", 256: "#5a8f29"}


def plot_growth(results: dict[Case, Result], title: str, path: Path) -> None:
    """Two panels over the sequence length, one line per method and pass, written as a PNG."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    panels[0].set(title="Time of a call", ylabel="milliseconds")
    panels[1].set(title="Peak memory beyond the inputs", ylabel="MiB")
    for method, color in COLORS.items():
        for passes, style in STYLES.items():
            rows = [
                (c.seqlen, r)
                for c, r in results.items()
                if (c.method, c.passes) == (method, passes)
            ]
            lengths = [seqlen for seqlen, _ in rows]
            line = {"color": color, "linestyle": style, "marker": "o", "markersize": 4}
            label = f"{method}, {passes}"
            panels[0].plot(lengths, [r.seconds * 1e3 for _, r in rows], label=label, **line)
            panels[1].plot(lengths, [r.extra_bytes / 2**20 for _, r in rows], label=label, **line)
    for panel in panels:
        panel.set_yscale("log")
    panels[0].legend(frameon=False)
    finish(figure, panels, sorted({case.seqlen for case in results}), title, path)


def plot_ratios(result: dict[str, Any], path: Path) -> None:
    """A panel for each dtype and pass: how many times as fast as SDPA, with the spread of rounds.

    `result` is what gpu.py writes.
    """
    rows = result["rows"]
    kinds = list(dict.fromkeys((row["dtype"], row["passes"]) for row in rows))
    width = 4.2 * len(kinds)
    figure, grid = plt.subplots(
        1, len(kinds), figsize=(width, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    panels = list(grid[0])
    for panel, kind in zip(panels, kinds):
        panel.set(title=f"{kind[1]}, {kind[0]}")
        panel.axhline(1.0, color="black", linewidth=1)
        chosen = [row for row in rows if (row["dtype"], row["passes"]) == kind]
        for head_dim, causal in dict.fromkeys((row["head_dim"], row["causal"]) for row in chosen):
            points = [
                row for row in chosen if (row["head_dim"], row["causal"]) == (head_dim, causal)
            ]
            ratios = [row["ratio"] for row in points]
            panel.errorbar(
                [row["seqlen"] for row in points],
                [ratio["median"] for ratio in ratios],
                yerr=[
                    [ratio["median"] - ratio["min"] for ratio in ratios],
                    [ratio["max"] - ratio["median"] for ratio in ratios],
                ],
                label=f"head dim {head_dim}, {'causal' if causal else 'full'}",
                color=HEAD_DIM_COLORS.get(head_dim, "#555555"),
                linestyle="-" if causal else "--",
                marker="o",
                markersize=4,
                capsize=2,
            )
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=6, frameon=False)
    panels[0].set_ylabel("SDPA's time / flash_attn's time")
    title = f"{result['device']}, torch {result['versions']['torch']}, {result['date']}"
    finish(figure, panels, sorted({row["seqlen"] for row in rows}), title, path)


def plot_peers(result: dict[str, Any], path: Path) -> None:
    """A panel for each pass: TFLOP/s over those of the best other method, dense calls.

    `result` is what peers.py writes.
    """
    rows = [row for row in result["rows"] if row["kind"] == "dense"]
    lengths = sorted({row["seqlen"] for row in rows})
    passes = list(dict.fromkeys(row["passes"] for row in rows))
    width = 5.2 * len(passes)
    figure, grid = plt.subplots(
        1, len(passes), figsize=(width, 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    panels = list(grid[0])
    for panel, which in zip(panels, passes):
        panel.set(title=which)
        panel.axhline(1.0, color="black", linewidth=1)
        measured = {row["seqlen"] for row in rows if row["passes"] == which}
        for head_dim, causal in dict.fromkeys((row["head_dim"], row["causal"]) for row in rows):
            points = [
                row
                for row in rows
                if (row["passes"], row["head_dim"], row["causal"]) == (which, head_dim, causal)
            ]
            if len(points) < len(measured):
                continue
            panel.plot(
                [row["seqlen"] for row in points],
                [row["ratio"] for row in points],
                label=f"head dim {head_dim}, {'causal' if causal else 'full'}",
                color=HEAD_DIM_COLORS.get(head_dim, "#555555"),
                linestyle="-" if causal else "--",
                marker="o",
                markersize=4,
            )
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, frameon=False)
    panels[0].set_ylabel("TFLOP/s over the best of the others")
    title = f"{result['device']}, torch {result['versions']['torch']}, {result['date']}"
    finish(figure, panels, lengths, title, path)


def plot_training(result: dict[str, Any], path: Path) -> None:
    """Losses of the methods, step by step, and the time of a step beside them.

    `result` is what training.py writes.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    panels[0].set(title="Loss", xlabel="step")
    panels[1].set(title="Time of a step", xlabel="milliseconds")
    names = [row["method"] for row in result["rows"]]
    for index, row in enumerate(result["rows"]):
        panels[0].plot(row["losses"], label=row["method"], linestyle=LINES[index % len(LINES)])
        panels[1].barh(row["method"], row["step_ms"], color=f"C{index}")
    panels[0].legend(frameon=False)
    panels[1].invert_yaxis()
    panels[1].set_yticks(range(len(names)), names)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['device']}, torch {result['versions']['torch']}, {result['date']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def finish(figure: Any, panels: Any, lengths: list[int], title: str, path: Path) -> None:
    """What all pictures share: an axis of sequence lengths, a title, the file."""
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.set_xlabel("sequence length")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
