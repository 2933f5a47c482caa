"""`python -m build_tools stand-in`: a wheel that has nothing but a name, `flash-attn-3`.

Some programs look for FlashAttention-3's distribution before they import its modules, which this
package has: TransformerEngine, diffusers, transformers from version 5 on. Who wants them to find it
installs this wheel as well. It requires this package and says that those modules are its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import flash_attn_3
from build_tools.matrix import RELEASE
from build_tools.wheel_name import PROJECT
from build_tools.zip_file import Entries, Entry, wheel_order, write

DISTRIBUTION = "flash_attn_3"
MODULES = ("flash_attn_3", "flash_attn_interface")
NAME = f"{DISTRIBUTION}-{flash_attn_3.__version__}"
FILE = f"{NAME}-py3-none-any.whl"


def wheel() -> bytes:
    """The bytes of the wheel."""
    texts = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {flash_attn_3.__version__}\n"
            f"Summary: A name by which programs find the FlashAttention-3 interface of {PROJECT}\n"
            f"License: BSD-3-Clause\nRequires-Dist: {PROJECT}=={RELEASE}\n"
        ),
        "WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: {PROJECT} ({RELEASE})\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n\n"
        ),
        "top_level.txt": "".join(f"{name}\n" for name in MODULES),
    }
    folder = f"{NAME}.dist-info"
    entries: Entries = {f"{folder}/{name}": Entry(x.encode()) for name, x in texts.items()}
    lines = [f"{name},{entries[name].record}\n" for name in wheel_order(entries)]
    record = f"{folder}/RECORD"
    entries[record] = Entry("".join([*lines, f"{record},,\n"]).encode())
    return write(entries, wheel_order(entries))


def add_parser(commands: Any) -> None:
    """The subcommand with its options."""
    s = commands.add_parser("stand-in", help="a wheel by which programs find flash-attn-3 here")
    s.add_argument("--to", default="dist", metavar="DIR", help="default: dist")


def run(options: argparse.Namespace) -> int:
    path = Path(options.to, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wheel())
    print(path)
    return 0
