"""Time and memory from `pip install` to the first attention call, by the way it is installed.

    python benchmarks/install.py --wheel dist/whl/flash-attn/flash_attn-...manylinux....whl

Needs torch, setuptools and, for the builds, what docs/building.md names; fetches nothing. Each way
installs into a new folder with an empty cache. Writes results/<date>-install-<processor>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build_tools import jobs, mirror, serve

ROOT = Path(__file__).resolve().parents[1]
# The first call: what an import costs is part of it.
CALL = """
import os, torch, flash_attn
assert flash_attn.__file__.startswith(os.environ["PYTHONPATH"]), flash_attn.__file__
q = torch.randn(1, 128, 4, 64)
assert flash_attn.flash_attn_func(q, q, q, causal=True).isfinite().all()
"""
SAMPLE_SECONDS = 0.05
KIB_OF_GIB = 1 << 20


@dataclass(frozen=True)
class Way:
    """A way to install.

    Args:
        options: of `pip install`.
        settings: of the environment.
        runs: of which the fastest is told.
        limit_gib: of the address space of each process; 0 for none.
    """

    name: str
    options: tuple[str, ...]
    settings: tuple[tuple[str, str], ...] = ()
    runs: int = 3
    limit_gib: int = 0

    @property
    def compiles(self) -> bool:
        return ("FLASH_ATTN_BUILD", "source") in self.settings


@dataclass(frozen=True)
class Cost:
    """What one run cost; memory is the largest sum of resident sets of all its processes."""

    install_seconds: float
    call_seconds: float
    peak_mb: int


def run(command: list[str], settings: dict[str, str], cwd: Path, limit_gib: int) -> int:
    """Runs a command to its end; returns the peak memory of it and its children, in bytes."""

    if limit_gib:
        command = ["sh", "-c", 'ulimit -v "$0" && exec "$@"', str(limit_gib * KIB_OF_GIB), *command]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            cwd=cwd,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        peak = 0
        while child.poll() is None:
            peak = max(peak, resident_bytes(child.pid))
            time.sleep(SAMPLE_SECONDS)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{said.read()}")
    return peak


def resident_bytes(session: int) -> int:
    """The resident sets of all processes of a session."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text("utf-8").rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += int(fields[21]) * resource.getpagesize()
    return total


def measure(way: Way) -> Cost:
    """One run in a new folder with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "target")
        settings = {"PYTHONPATH": str(target), "PIP_CONFIG_FILE": os.devnull, **dict(way.settings)}
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
        command += ["--no-deps", "--cache-dir", f"{folder}/cache", "--target", str(target)]
        start = time.monotonic()
        peak = run([*command, *way.options], settings, Path(folder), way.limit_gib)
        installed = time.monotonic()
        call = run([sys.executable, "-c", CALL], settings, Path(folder), 0)
        done = time.monotonic()
    return Cost(
        round(installed - start, 2), round(done - installed, 2), round(max(peak, call) / 1e6)
    )


def ways(wheel: Path, sdist: Path, url: str, arch: str) -> list[Way]:
    """Every way, the quick ones first."""
    plain = "--no-build-isolation", str(sdist)
    compiled = (("FLASH_ATTN_BUILD", "source"), ("FLASH_ATTN_CUDA_ARCHS", arch))
    return [
        Way("universal wheel, a file", (str(wheel),)),
        Way("universal wheel, from a mirror", ("--index-url", f"{url}/whl", "flash-attn==2.8.3")),
        Way("source archive, wheel of a mirror", plain, (("FLASH_ATTN_WHEEL_MIRROR", url),)),
        Way("source archive, no kernels", plain, (("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE"),)),
        Way(f"source archive, compiled for sm_{arch}", plain, compiled, 2),
        Way(
            f"source archive, compiled for sm_{arch}, 4 GiB for each process", plain, compiled, 2, 4
        ),
    ]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a mirror that is served on this machine."""
    with serve.server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def make_sdist(folder: Path) -> Path:
    program = "import sys; from build_tools import backend; backend.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", program, str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return next(folder.glob("*.tar.gz"))


def fastest(costs: list[Cost]) -> Cost:
    """The run that counts: what else the machine does can only slow one down."""
    return min(costs, key=lambda cost: cost.install_seconds + cost.call_seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True, help="the universal wheel")
    parser.add_argument("--arch", default="90", help="what the builds from source are for")
    parser.add_argument("--no-builds", action="store_true", help="leave out what compiles")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mirror.mirror(str(options.wheel.resolve().parents[2]), folder / "mirror")
        sdist = make_sdist(folder)
        rows = []
        with served(folder / "mirror") as url:
            for way in ways(options.wheel.resolve(), sdist, url, options.arch):
                if options.no_builds and way.compiles:
                    continue
                costs = [measure(way) for _ in range(way.runs)]
                rows.append({"way": way.name, "runs": way.runs, **asdict(fastest(costs))})
                print(rows[-1], file=sys.stderr, flush=True)
    result = {
        "cores": jobs.cores(),
        "python": platform.python_version(),
        "wheel": options.wheel.name,
        "wheel_bytes": options.wheel.stat().st_size,
    }
    path = report.write({**report.of_processor("install"), **result, "rows": rows})
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
