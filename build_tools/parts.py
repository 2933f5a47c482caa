"""Parts: one compiled image of one unit, under a name that its content decides.

The address is a hash of the unit, of every header it reaches, of the options and of the compiler,
so a part that stands is never out of date.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from build_tools.arch import Arch
from build_tools.codegen import Unit
from build_tools.compilers import FLAGS, INCLUDE_DIRS, NVCC_FLAGS, NVRTC_FLAGS

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What a compiler said and took."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    seconds: float
    peak_mb: int
    code_bytes: int
    # C7510 and its kin: ptxas has made products wait for each other, or registers stay in memory.
    remark: str = ""


@dataclass(frozen=True)
class Part:
    """One image: where it stands once built."""

    unit: Unit
    arch: Arch
    digest: str
    folder: Path

    @property
    def stem(self) -> str:
        return f"{self.unit.symbol}-{self.arch.flag}-{self.digest[:16]}"

    @property
    def code(self) -> Path:
        return self.folder / f"{self.stem}.{self.arch.form}"

    @property
    def source(self) -> Path:
        return self.folder / f"{self.stem}.cu"

    @property
    def facts_file(self) -> Path:
        return self.folder / f"{self.stem}.json"

    @property
    def error(self) -> Path:
        """What the compiler said if it refused the unit."""
        return self.folder / f"{self.stem}.error"

    @property
    def is_built(self) -> bool:
        """Whether it stands whole: a machine that went down may leave files without contents."""
        try:
            return self.code.stat().st_size == self.facts().code_bytes
        except (OSError, ValueError, TypeError):  # no such files, no JSON, other facts
            return False

    def facts(self) -> Facts:
        return Facts(**json.loads(self.facts_file.read_text("utf-8")))

    def store(self, code: bytes, facts: Facts) -> None:
        """Writes the part so that a process that dies leaves none or a whole one."""
        half = self.code.with_suffix(".half")
        for file, data in (
            (self.facts_file, json.dumps(asdict(facts)).encode()),
            (self.code, code),
        ):
            half.write_bytes(data)
            half.replace(file)


def make_part(unit: Unit, arch: Arch, identity: str, folder: Path) -> Part:
    parts = [unit.source, identity, arch.flag, arch.form, *FLAGS, *NVRTC_FLAGS, *NVCC_FLAGS]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in headers(unit.source):
        digest.update(path.name.encode() + b"\0" + _bytes_of(path))
    return Part(unit, arch, digest.hexdigest(), folder)


def headers(source: str) -> list[Path]:
    """Every file that a source includes, directly or not, sorted."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        for name in INCLUDE.findall(waiting.pop()):
            path = _resolve(name)
            if path not in found:
                found.add(path)
                waiting.append(_bytes_of(path).decode())
    return sorted(found)


def _resolve(name: str) -> Path:
    for folder in INCLUDE_DIRS:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f'#include "{name}": not in {", ".join(map(str, INCLUDE_DIRS))}')


@cache
def _bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def facts_of_log(log: str, seconds: float, peak_mb: int, code: bytes) -> Facts:
    """Reads what ptxas -v says of a kernel; PTX has no registers yet."""

    def number(pattern: str) -> int:
        return sum(int(x) for x in re.findall(pattern, log))

    return Facts(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes stack frame"),
        round(seconds, 2),
        peak_mb,
        len(code),
        "; ".join(re.findall(r"\(C75\d\d\) .*", log)),
    )
