"""The build front: `python -m build_tools COMMAND`.

`kernels`, `host`, `shim` and `all` build in place, for this machine; `matrix`, `part`, `build`,
`slim`, `audit`, `mirror`, `verify`, `serve` and `stand-in` are about wheels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from build_tools import (
    assemble,
    audit,
    kernels,
    matrix_report,
    mirror,
    native,
    serve,
    slim,
    stand_in,
)
from build_tools.ninja import BuildError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m build_tools", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    k = commands.add_parser("kernels", help="compile the CUDA kernels into flash_attn/kernels")
    a = commands.add_parser("all", help="kernels, host library and shim")
    for command in (k, a):
        command.add_argument("--arch", help="e.g. 80,90 or 80+ptx or all; default: the GPUs here")
        command.add_argument("--compiler", choices=("nvrtc", "nvcc"), default="nvrtc")
        command.add_argument("--compiler-path", help="the NVRTC library or the nvcc to use")
        command.add_argument("--jobs", type=int, help="compilers at a time; default: what fits")
        command.add_argument("--only", help="only kernels with this text in their name")
        command.add_argument("--report", action="store_true", help="print what each kernel uses")
    commands.add_parser("host", help="build the host library")
    s = commands.add_parser("shim", help="build the shim for a torch")
    for command in (s, a):
        command.add_argument("--python", help="a Python with the torch to build for")
    matrix_report.add_parser(commands)
    assemble.add_parsers(commands)
    slim.add_parser(commands)
    audit.add_parser(commands)
    mirror.add_parsers(commands)
    serve.add_parser(commands)
    stand_in.add_parser(commands)
    return made


# What takes the options of a command and returns the exit status.
OF_WHEELS = {
    "matrix": matrix_report.run,
    "part": assemble.run_part,
    "build": assemble.run_build,
    "slim": slim.run,
    "audit": audit.run,
    "mirror": mirror.run,
    "verify": mirror.run_verify,
    "serve": serve.run,
    "stand-in": stand_in.run,
}


def run(options: argparse.Namespace) -> int:
    if options.command in OF_WHEELS:
        return OF_WHEELS[options.command](options)
    if options.command in ("host", "all"):
        print(native.host())
    if options.command in ("shim", "all"):
        print(native.shim(torch=native.find_torch(options.python or sys.executable)))
    if options.command in ("kernels", "all"):
        return build_kernels(options)
    return 0


def build_kernels(options: argparse.Namespace) -> int:
    parts = kernels.build(
        options.arch, options.compiler, options.compiler_path, options.jobs, options.only
    )
    if options.report:
        text = kernels.report(parts)
        Path(kernels.PARTS, "report.md").write_text(text, "utf-8")
        print(text)
    for warning in kernels.warnings(parts):
        print(warning, file=sys.stderr)
    return 0


def main(arguments: Optional[Sequence[str]] = None) -> int:
    try:
        return run(parser().parse_args(arguments))
    except (BuildError, OSError, ValueError) as error:
        print(f"build_tools: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build_tools: interrupted; run again it goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
