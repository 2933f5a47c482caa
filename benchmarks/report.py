"""Results of benchmarks: what machine it was, the JSON file, the command line of a GPU's."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

RESULTS = Path(__file__).resolve().parent / "results"


def of_processor(kind: str) -> dict[str, str]:
    """What a result of `kind` begins with on the CPU."""
    return {"kind": kind, "date": datetime.date.today().isoformat(), "device": processor()}


def processor() -> str:
    """The processor's name, as its maker gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text("utf-8") if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def of_gpu(kind: str, versions: Optional[dict[str, str]] = None) -> dict[str, Any]:
    """What it begins with on a GPU; `versions`: of other libraries."""
    import torch

    import flash_attn

    table = Path(flash_attn.__file__).parent / "kernels" / "index.txt"
    lines = table.read_text("utf-8").splitlines()[1:] if table.exists() else []
    images = {tuple(line.split()[4:6]) for line in lines}
    return {
        "kind": kind,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": smi("driver_version"),
        "power_limit": smi("power.limit"),
        "max_clock": smi("clocks.max.sm"),
        "kernels": sorted(f"{arch} {form}" for arch, form in images),
        "versions": {
            "flash-attn": flash_attn.__version__,
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "Python": platform.python_version(),
            **(versions or {}),
        },
    }


def smi(field: str) -> str:
    """What the driver's tool says of the first GPU; empty where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write(result: dict[str, Any], out: Optional[Path] = None) -> Path:
    """The result as JSON, a row a line, numbers of four digits."""
    path = out or RESULTS / file_name(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = {key: rows for key, rows in result.items() if is_table(rows)}
    head = {key: rounded(value) for key, value in result.items() if key not in tables}
    parts = [json.dumps(head, indent=1)[:-2]]
    for key, rows in tables.items():
        lines = ",\n".join(f"  {json.dumps(rounded(row))}" for row in rows)
        parts.append(f' "{key}": [\n{lines}\n ]')
    text = ",\n".join(parts) + "\n}\n"
    path.write_text(text, "utf-8")
    return path


def is_table(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(row, dict) for row in value)


def file_name(result: dict[str, Any]) -> str:
    """<date>-<kind>-<device>.json; with the architecture that was built, without plain kinds."""
    kind = "" if result["kind"] in ("cpu", "gpu") else result["kind"]
    device = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return "-".join(filter(None, (result["date"], kind, result.get("arch"), device))) + ".json"


def rounded(value: Any) -> Any:
    """The same with four significant digits in every float."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run_or_plot(
    description: str,
    add_options: Callable[[argparse.ArgumentParser], Any],
    run: Callable[[argparse.Namespace], Path],
    draw: Callable[[dict[str, Any], Path], None],
) -> int:
    """The command line of a benchmark: `run` with its options, or `plot` beside a result."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure this GPU")
    add_options(runs)
    runs.add_argument("--out", type=Path, help="the JSON file to write")
    plots = commands.add_parser("plot", help="draw a result")
    plots.add_argument("result", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        print(run(arguments))
        return 0
    picture = arguments.result.with_suffix(".png")
    draw(json.loads(arguments.result.read_text("utf-8")), picture)
    print(picture)
    return 0
