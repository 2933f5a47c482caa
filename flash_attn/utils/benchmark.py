"""Times of a function, forward and backward, as scripts around the published package take them.

Each function takes `fn` with its arguments. repeats: calls that are timed. desc: a line printed
first. verbose: print what was measured. amp: run under autocast to `amp_dtype`.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import benchmark

Measured = tuple[benchmark.Timer, benchmark.Measurement]


def _device(inputs: tuple[Any, ...]) -> str:
    return next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")


def _forward(
    fn: Callable[..., Any], inputs: tuple[Any, ...], options: dict[str, Any], amp: bool, dtype: Any
) -> Tensor:
    """The result, or the first of several."""
    with torch.autocast(_device(inputs), dtype=dtype, enabled=amp):
        y = fn(*inputs, **options)
    return y[0] if isinstance(y, tuple) else y


def _gradient_of(y: Tensor, grad: Optional[Tensor]) -> Tensor:
    if grad is None:
        return torch.randn_like(y)
    if grad.shape != y.shape:
        raise RuntimeError(
            f"grad must have the shape of the output, {tuple(y.shape)}; got {tuple(grad.shape)}"
        )
    return grad


def _forget_gradients(inputs: tuple[Any, ...]) -> None:
    for x in inputs:
        if isinstance(x, Tensor):
            x.grad = None


def _timed(call: Callable[[], Any], repeats: int, what: str, verbose: bool) -> Measured:
    if verbose:
        print(what)
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    measured = timer.timeit(repeats)
    if verbose:
        print(measured)
    return timer, measured


def benchmark_forward(
    fn: Callable[..., Any],
    *inputs: Any,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Measured:
    """(timer, measurement) of the forward pass."""
    return _timed(
        lambda: _forward(fn, inputs, kwinputs, amp, amp_dtype),
        repeats,
        f"{desc} - Forward pass",
        verbose,
    )


def benchmark_backward(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Optional[Tensor] = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Measured:
    """(timer, measurement) of the backward pass. grad: of the output; None is random."""
    y = _forward(fn, inputs, kwinputs, amp, amp_dtype)
    gradient = _gradient_of(y, grad)

    def call() -> None:
        _forget_gradients(inputs)
        y.backward(gradient, retain_graph=True)

    return _timed(call, repeats, f"{desc} - Backward pass", verbose)


def benchmark_combined(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Optional[Tensor] = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Measured:
    """(timer, measurement) of both passes. grad: of the output; None is random."""
    gradient = _gradient_of(_forward(fn, inputs, kwinputs, amp, amp_dtype), grad)

    def call() -> None:
        _forget_gradients(inputs)
        _forward(fn, inputs, kwinputs, amp, amp_dtype).backward(gradient, retain_graph=True)

    return _timed(call, repeats, f"{desc} - Forward + Backward pass", verbose)


def benchmark_fwd_bwd(
    fn: Callable[..., Any], *inputs: Any, grad: Optional[Tensor] = None, **options: Any
) -> tuple[Measured, Measured]:
    """`benchmark_forward` and `benchmark_backward`."""
    return (
        benchmark_forward(fn, *inputs, **options),
        benchmark_backward(fn, *inputs, grad=grad, **options),
    )


def benchmark_all(
    fn: Callable[..., Any], *inputs: Any, grad: Optional[Tensor] = None, **options: Any
) -> tuple[Measured, Measured, Measured]:
    """`benchmark_forward`, `benchmark_backward` and `benchmark_combined`."""
    return (
        *benchmark_fwd_bwd(fn, *inputs, grad=grad, **options),
        benchmark_combined(fn, *inputs, grad=grad, **options),
    )


def pytorch_profiler(
    fn: Callable[..., Any],
    *inputs: Any,
    trace_filename: Optional[str] = None,
    backward: bool = False,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    cpu: bool = False,
    verbose: bool = True,
    **kwinputs: Any,
) -> None:
    """Runs fn under torch's profiler, behind 30 calls to warm up.

    Args:
        trace_filename: where a trace for Chrome goes.
        backward: run the backward pass too.
        cpu: look at the CPU as well as at the GPU.
        verbose: print a table of the kernels.
    """
    gradient = None
    if backward:
        gradient = torch.randn_like(_forward(fn, inputs, kwinputs, amp, amp_dtype))

    def call() -> None:
        if gradient is not None:
            _forget_gradients(inputs)
        y = _forward(fn, inputs, kwinputs, amp, amp_dtype)
        if gradient is not None:
            y.backward(gradient, retain_graph=True)

    for _ in range(30):
        call()
    on_gpu = _device(inputs) == "cuda"
    activities = [ProfilerActivity.CPU] * (cpu or not on_gpu) + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, record_shapes=True) as seen:
        call()
    if verbose:
        print(seen.key_averages().table(row_limit=50))
    if trace_filename is not None:
        seen.export_chrome_trace(trace_filename)


def benchmark_memory(
    fn: Callable[..., Any], *inputs: Any, desc: str = "", verbose: bool = True, **kwinputs: Any
) -> float:
    """The most GPU memory, in GB of 1e9 bytes, that there is while fn runs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    fn(*inputs, **kwinputs)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() / 1e9
    if verbose:
        print(f"{desc} max memory: {most}GB")
    torch.cuda.empty_cache()
    return most
