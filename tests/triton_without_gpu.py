"""Triton compiles for a GPU that is not there: nothing is launched, and what would be is kept in
`LAUNCHED`, a kernel's arguments each time.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from flash_attn._triton.numbers import VERSION
from flash_attn.backends import triton as backend

LAUNCHED: list[tuple[Any, ...]] = []


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        loaded = (1, 1, 32, 0, 1024)  # module, function, registers, spills; since 3.4 threads
        return loaded if VERSION >= (3, 4) else loaded[:4]

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}


class _Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *given: Any) -> None:
        LAUNCHED.append(given[9:])  # behind the grid, the stream, the function and four more


class _Driver:
    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> None:
    """CPU tensors go to Triton's kernels from now on."""
    driver.set_active(_Driver())
    backend.takes = lambda device_type: True  # type: ignore[assignment]
