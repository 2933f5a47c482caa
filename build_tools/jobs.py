"""How many compilers at a time: what cores, the container and memory allow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from build_tools.paths import env

# Of a compiler process that has not been measured yet.
TYPICAL_PEAK_MB = 500
CGROUP = Path("/sys/fs/cgroup")


def cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use: its affinity, and the container's share."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    quota = _cpu_quota(cgroup)
    return max(1, min(allowed, quota) if quota else allowed)


def _cpu_quota(cgroup: Path) -> Optional[int]:
    text = _read(cgroup / "cpu.max")
    if text:
        quota, period = [*text.split(), "100000"][:2]
    else:
        quota = _read(cgroup / "cpu" / "cpu.cfs_quota_us") or "max"
        period = _read(cgroup / "cpu" / "cpu.cfs_period_us") or "100000"
    if not quota.isdecimal() or int(quota) == 0:
        return None
    return -(-int(quota) // int(period))


def memory_mb(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> Optional[int]:
    """Memory that is free for this process, or None where nobody says."""
    free = []
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) // 1024)
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        most, now = _read(cgroup / limit), _read(cgroup / used)
        if most.isdecimal() and now.isdecimal():
            # Files that were read count as used, until somebody needs the room.
            cached = re.search(
                r"^(?:total_)?inactive_file (\d+)$", _read(cgroup / stat), re.MULTILINE
            )
            free.append((int(most) - int(now) + (int(cached[1]) if cached else 0)) >> 20)
    return max(0, min(free)) if free else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""


def choose(option: Optional[int], peaks_mb: Iterable[int]) -> int:
    """Jobs: the option, else MAX_JOBS, else what cores and memory allow.

    Args:
        peaks_mb: peak memory of processes measured before; the largest one counts.
    """
    if option is not None and option < 1:
        raise ValueError(f"--jobs is {option}; it must be a positive number")
    asked = option or env.MAX_JOBS.count()
    if asked:
        return asked
    free = memory_mb()
    by_memory = cores() if free is None else free // max((*peaks_mb, TYPICAL_PEAK_MB))
    return max(1, min(cores(), by_memory))
