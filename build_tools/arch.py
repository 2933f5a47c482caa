"""Architectures: "90" is code for compute capability 9.0, "90a" for it alone, "80+ptx" is PTX."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Optional

from build_tools.paths import env

# Names that torch's list takes, of what kernels serve.
NAMES = {
    "ampere": "8.0 8.6+PTX",
    "ampere+tegra": "8.7",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
    "blackwell+tegra": "11.0",
}
# What a driver has to answer in; one that hangs would take the build along.
TIMEOUT = 60.0


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

    As in torch's list, `9.0+PTX` asks for code and PTX, and `Hopper` is a name for that.
    """
    if text.strip().lower() == "all":
        return None
    archs = []
    found = [NAMES.get(word.lower(), word) for word in re.split(r"[,;\s]+", text) if word]
    for word in " ".join(found).split() or [text]:
        arch = Arch.parse(word)
        if arch.is_ptx and "." in word:
            archs.append(Arch(arch.number, arch.suffix))
        archs.append(arch)
    return list(dict.fromkeys(archs))


def local_gpus() -> list[Arch]:
    """Architectures of the GPUs of this machine; none where the driver's tool is not there.

    A GPU that is ill has `[N/A]` for its own, and is left out.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(map(Arch.parse, set(re.findall(r"(?m)^\d+\.\d$", child.stdout))))


def wanted(option: Optional[str]) -> Optional[list[Arch]]:
    """What to build for: the option, the environment, or the GPUs here; None for all."""
    if option:
        return parse_list(option)
    setting = env.FLASH_ATTN_CUDA_ARCHS.setting()
    if setting is None:
        return local_gpus() or None
    name, text = setting
    try:
        return parse_list(text)
    except ValueError as error:
        raise ValueError(f"{name} is set to {text!r}: {error}") from None
