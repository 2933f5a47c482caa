"""Architectures: "90" is code for compute capability 9.0, "90a" for it alone, "80+ptx" is PTX."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Optional

from build_tools.paths import env


@dataclass(frozen=True)
class Arch:
    """One thing to compile for; PTX comes after all code."""

    number: int
    suffix: str = ""
    is_ptx: bool = False

    @classmethod
    def parse(cls, text: str) -> Arch:
        """`90`, `9.0`, `sm_90a`, `8.0+PTX`; ValueError for anything else."""
        pattern = r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)(\+ptx)?"
        found = re.fullmatch(pattern, text.strip().lower())
        if found is None:
            raise ValueError(f"{text!r} is no CUDA architecture; write it like 80, 9.0 or 80+ptx")
        major, minor, suffix, ptx = found.groups()
        return cls(int(major) * 10 + int(minor), suffix, ptx is not None)

    @property
    def flag(self) -> str:
        """What a compiler's architecture option takes."""
        return f"{'compute' if self.is_ptx else 'sm'}_{self.number}{self.suffix}"

    @property
    def form(self) -> str:
        return "ptx" if self.is_ptx else "cubin"

    def __lt__(self, other: Arch) -> bool:
        return (self.is_ptx, self.number, self.suffix) < (other.is_ptx, other.number, other.suffix)

    def __str__(self) -> str:
        return f"{self.number}{self.suffix}{'+ptx' if self.is_ptx else ''}"


def parse_list(text: str) -> Optional[list[Arch]]:
    """Architectures between commas, semicolons or blanks; None for `all`.

    As in torch's list, `9.0+PTX` asks for code and PTX.
    """
    if text.strip().lower() == "all":
        return None
    archs = []
    for word in re.split(r"[,;\s]+", text.strip()):
        arch = Arch.parse(word)
        if arch.is_ptx and "." in word:
            archs.append(Arch(arch.number, arch.suffix))
        archs.append(arch)
    return list(dict.fromkeys(archs))


def local_gpus() -> list[Arch]:
    """Architectures of the GPUs of this machine; none where the driver's tool is not there."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        return sorted({Arch.parse(line) for line in child.stdout.split()})
    except (OSError, subprocess.CalledProcessError, ValueError):
        return []


def wanted(option: Optional[str]) -> Optional[list[Arch]]:
    """What to build for: the option, the environment, or the GPUs here; None for all."""
    text = option or env.FLASH_ATTN_CUDA_ARCHS.text()
    if text is not None:
        return parse_list(text)
    return local_gpus() or None
