"""What is installed here, what would run, and what to do about what doesn't."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any, Optional

import torch

from flash_attn import _env, _support, backends
from flash_attn._problem import Problem
from flash_attn._version import __version__
from flash_attn.backends import cuda, triton

# Title, dtype, head dims of q and k and of v, features.
_TYPICAL: tuple[tuple[str, str, tuple[int, int], frozenset[str]], ...] = (
    ("training, causal", "bfloat16", (128, 128), frozenset({"causal", "backward"})),
    (
        "training, packed sequences, GQA",
        "bfloat16",
        (128, 128),
        frozenset({"varlen", "gqa", "backward"}),
    ),
    ("training, dropout, ALiBi", "float16", (64, 64), frozenset({"dropout", "alibi", "backward"})),
    ("training, head dim 256, softcap", "bfloat16", (256, 256), frozenset({"softcap", "backward"})),
    ("decoding, KV cache, GQA", "bfloat16", (128, 128), frozenset({"kv_append", "gqa", "causal"})),
    ("decoding, paged cache, window", "bfloat16", (128, 128), frozenset({"paged_kv", "window"})),
    ("decoding, FP8 cache", "bfloat16", (128, 128), frozenset({"fp8", "paged_kv", "gqa"})),
    ("decoding, latent attention", "bfloat16", (64, 512), frozenset({"qv", "paged_kv", "gqa"})),
    ("prefill, FP8", _support.FP8_DTYPE, (128, 128), frozenset({"fp8", "causal"})),
)


@dataclass(frozen=True)
class Device:
    """A device that attention may run on."""

    name: str
    description: str
    capability: Optional[tuple[int, int]] = None

    @property
    def type(self) -> str:
        return self.name.split(":")[0]


@dataclass(frozen=True)
class Plan:
    """What runs a typical problem on a device: a backend, or why none that takes it does.

    `kernels` are those of the passes, where the backend has compiled ones.
    """

    device: str
    title: str
    backend: Optional[str]
    kernels: list[str]
    reasons: dict[str, list[str]]


def versions() -> dict[str, Optional[str]]:
    """Versions of what matters here; None for a package that is not installed."""
    found: dict[str, Optional[str]] = {
        "flash_attn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA kernels": cuda.installed(),
        "platform": platform.platform(),
    }
    for package in ("triton", "einops"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[Device]:
    """The CPU and every CUDA device that torch sees."""
    found = [Device("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        words = f"{torch.cuda.get_device_name(index)}, cc {capability[0]}.{capability[1]}"
        found.append(Device(f"cuda:{index}", words, capability))
    return found


def plans() -> list[Plan]:
    """What would run for typical problems on every device."""
    made = []
    for device in devices():
        for title, dtype, head_dims, features in _TYPICAL:
            problem = Problem(device.type, dtype, *head_dims, features, device.capability)
            rows = backends.explain(problem)
            chosen = next((name for name, reasons in rows if not reasons), None)
            takers = [row.name for row in _support.BACKENDS if device.type in row.device_types]
            reasons = {name: words for name, words in rows if name in takers}
            kernels = cuda.kernels(problem) if chosen == "cuda" else []
            made.append(Plan(device.name, title, chosen, kernels, reasons))
    return made


def served_devices() -> list[str]:
    """Devices on which at least one typical problem runs."""
    return list(dict.fromkeys(plan.device for plan in plans() if plan.backend is not None))


def environment() -> dict[str, str]:
    """The package's environment variables that are set, as set."""
    return dict(found for v in _env.VARIABLES if (found := v.setting()) is not None)


def advice() -> list[str]:
    """What a person should know or do; empty if all is well."""
    told = []
    served = served_devices()
    reasons = {plan.device: plan.reasons for plan in reversed(plans())}
    for device in devices():
        if device.name not in served:
            words = "; ".join(f"{name}: {why[0]}" for name, why in reasons[device.name].items())
            told.append(
                f"{device.name} ({device.description}) is not served: {words}. Remedy: "
                f"{cuda.REMEDY}, or {triton.REMEDY}. Until then run attention on CPU tensors, or "
                "use torch.nn.functional.scaled_dot_product_attention on this device."
            )
    if cuda.is_damaged():
        told.append(f"CUDA kernels: {cuda.installed()}. Remedy: {cuda.REMEDY}.")
    if cuda.LOADER_SAID:
        told.append(f"The system's loader said of the CUDA backend: {cuda.LOADER_SAID}")
    if torch.version.cuda and not torch.cuda.is_available():
        told.append(
            f"torch is built for CUDA {torch.version.cuda} but sees no GPU: check the driver with "
            "`nvidia-smi`, and CUDA_VISIBLE_DEVICES."
        )
    told += [
        f"{name}={text} is set; the README says what it does."
        for name, text in environment().items()
    ]
    return told


def collect() -> dict[str, Any]:
    """Everything but the self-test, as plain data."""
    return {
        "versions": versions(),
        "devices": [vars(device) for device in devices()],
        "backends": [
            {"name": row.name, "devices": row.device_types, "dtypes": row.dtypes, "note": row.note}
            for row in _support.BACKENDS
        ],
        "plans": [vars(plan) for plan in plans()],
        "environment": environment(),
        "advice": advice(),
    }
