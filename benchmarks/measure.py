"""Time and peak extra memory of one attention call, measured in a process of its own.

`measure(case)` starts this file as a child, so that neither caches nor the heap of an earlier case
count in a later one. "Extra" is what the call holds at its peak beyond its inputs, outputs and
gradients included. On the CPU it is the growth of the resident set, from the kernel's own high
water mark; on CUDA it is the growth of PyTorch's allocator.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METHODS = ("flash_attn", "torch SDPA", "standard")
# Arguments of the call; SDPA has no softcap, and so shows what runs where it cannot.
SCORES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal, softcap": {"causal": True, "softcap": 30.0},
}
PASSES = ("fwd", "fwd+bwd")
WARM_UP_LENGTH = 64
# The fastest run counts, for what else the machine does can only slow one down. A call that is
# slow is not run a third time.
MIN_RUNS, MIN_SECONDS, SLOW_SECONDS = 3, 0.2, 4.0


@dataclass(frozen=True)
class Case:
    """One call to measure: `scores` is a key of `SCORES`; q, k, v are (1, seqlen, heads, d)."""

    method: str
    passes: str
    scores: str
    seqlen: int
    heads: int
    head_dim: int
    dtype: str
    device: str = "cpu"
    threads: int = 1

    @property
    def is_possible(self) -> bool:
        """Whether the method offers these scores without a matrix of length x length."""
        return self.method != "torch SDPA" or "softcap" not in SCORES[self.scores]

    @property
    def standard_bytes(self) -> int:
        """What standard attention will hold: scores, masked scores, softmax, and gradients."""
        size = 2 if self.dtype.endswith("16") else 4
        matrices = 3 if self.passes == PASSES[0] else 5
        return matrices * size * self.heads * self.seqlen**2


@dataclass(frozen=True)
class Result:
    """Seconds of the fastest call, and bytes at its peak beyond the inputs."""

    seconds: float
    extra_bytes: int


def measure(case: Case) -> Result:
    """Runs `case` in a fresh process; RuntimeError with its last words if that fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(case))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RuntimeError(f"{case.method}, length {case.seqlen}: {lines[-1]}")
    return Result(**json.loads(child.stdout))


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024  # given in kB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class ResidentPeak:
    """How far the resident set of this process grows past where it stood at `start`.

    Linux keeps a high water mark that can be set back; where it cannot, the mark of the whole life
    of the process stands in for it.
    """

    def start(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "ascii")
        self.base = self._bytes("VmRSS")

    def extra(self) -> int:
        return max(0, self._bytes("VmHWM") - self.base)

    def _bytes(self, field: str) -> int:
        status = Path("/proc/self/status")
        lines = status.read_text("ascii").splitlines() if status.exists() else []
        for line in lines:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class CudaPeak:
    """The same for memory of the current CUDA device."""

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_allocated()

    def extra(self) -> int:
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.base


def attention_call(case: Case, seqlen: int) -> Callable[[], None]:
    """The call of `case` on inputs of length `seqlen`, which are made here and now."""
    import torch
    import torch.nn.functional as F
    from standard import standard_attention

    from flash_attn import flash_attn_func

    scores = SCORES[case.scores]
    needs_grad = case.passes != PASSES[0]
    generator = torch.Generator(case.device).manual_seed(0)
    shape = (1, seqlen, case.heads, case.head_dim)
    kind = {"dtype": getattr(torch, case.dtype), "device": case.device}
    q, k, v, dout = (torch.randn(shape, generator=generator, **kind) for _ in range(4))
    leaves = [x.requires_grad_(needs_grad) for x in (q, k, v)]

    def attention() -> torch.Tensor:
        if case.method == "flash_attn":
            return flash_attn_func(q, k, v, **scores)
        if case.method == "standard":
            return standard_attention(q, k, v, **scores)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=bool(scores))
        return out.transpose(1, 2)

    def call() -> None:
        out = attention()
        if needs_grad:
            torch.autograd.grad(out, leaves, dout)
        if case.device == "cuda":
            torch.cuda.synchronize()

    return call


def run(case: Case) -> Result:
    """Measures `case` in this process: memory in the first full-size call, time in the next."""
    import torch

    torch.set_num_threads(case.threads)
    attention_call(case, WARM_UP_LENGTH)()
    call = attention_call(case, case.seqlen)
    peak = CudaPeak() if case.device == "cuda" else ResidentPeak()
    peak.start()
    call()
    extra_bytes = peak.extra()
    times: list[float] = []
    while sum(times) < MIN_SECONDS or (len(times) < MIN_RUNS and sum(times) < SLOW_SECONDS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return Result(min(times), extra_bytes)


if __name__ == "__main__":
    print(json.dumps(asdict(run(Case(**json.loads(sys.argv[1]))))))
