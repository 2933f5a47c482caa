"""The picture of the demo: time and memory against sequence length."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from measure import Case, Result

COLORS = {"flash_attn": "#0b6e8f", "standard": "#c2571a"}
STYLES = {"fwd": "-", "fwd+bwd": "--"}


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
    all_lengths = sorted({case.seqlen for case in results})
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(all_lengths, [str(length) for length in all_lengths])
        panel.set_xlabel("sequence length")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
