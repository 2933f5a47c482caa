"""Rules that other projects' tools tell: auditwheel and torch-abi-audit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from build_tools import native
from build_tools.audit_native import TORCH
from build_tools.audit_wheel import AuditedWheel, Broken, Context, Skipped
from build_tools.matrix_facts import numbers


def auditwheel(wheel: AuditedWheel, context: Context) -> str:
    """auditwheel finds the symbols of manylinux_2_28 or an earlier one, and torch to be linked."""
    platform = wheel.platform(context.matrix)
    if not platform.tag.startswith("manylinux"):
        raise Skipped(f"it does not know {platform.name}")
    told = _json("auditwheel", "show", "--json", str(wheel.path))
    found = str(told["sym_tag"])
    if not found.startswith("manylinux_") or _glibc(found) > _glibc(platform.tag):
        raise Broken(f"its symbols make it {found}")
    strange = set(told["external_libs"]) - {*TORCH, native.HOST_LIBRARY}
    if strange:
        raise Broken(f"{', '.join(sorted(strange))} would have to be put into the wheel")
    if any("blacklisted_symbols" in x for x in told["policy_upgrades"].values()):
        raise Broken(f"it uses symbols that no tag allows: {told['policy_upgrades']}")
    return f"{found}; from outside: {', '.join(sorted(told['external_libs']))}"


def _glibc(tag: str) -> tuple[int, ...]:
    return tuple(map(int, tag.split("_")[1:3]))


def torch_abi_audit(wheel: AuditedWheel, context: Context) -> str:
    """torch-abi-audit finds the stable ABI, of the torch that the shim is for."""
    name = native.STABLE_SHIM
    entry = next((x for file, x in wheel.modules.items() if file.endswith(f"/{name}")), None)
    if entry is None:
        raise Skipped(f"there is no {name}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(entry.data)
        told = _json("torch-abi-audit", "--json", str(file))
    return _verdict(told)


def _verdict(told: Any) -> str:
    for library in (*told["extensions"], *told["bundled_libs"]):
        torch, oldest = library["torch"], str(library["torch"]["min_torch_version"])
        if not torch["stable"] or torch["unknown_shim_symbols"]:
            raise Broken(
                f"not stable: {torch['unstable_symbols'] or torch['unknown_shim_symbols']}"
            )
        if numbers(oldest)[:2] > native.STABLE_SINCE:
            raise Broken(f"it needs torch {oldest}")
        return f"stable from torch {oldest} on"
    raise Broken("it finds no library")


def _json(program: str, *arguments: str) -> Any:
    """What a tool prints with --json."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        raise Skipped(f"{program} is not installed: `pip install {program}`")
    child = subprocess.run([found, *arguments], capture_output=True, text=True, check=False)
    try:
        return json.loads(child.stdout)
    except ValueError:
        raise Broken(f"{program} fails: {(child.stderr or child.stdout).strip()}") from None


RULES = (auditwheel, torch_abi_audit)
