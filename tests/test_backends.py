"""Which backend runs a problem, why the others do not, and what the environment changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import flash_attn
from flash_attn import _env, _support, backends
from flash_attn._problem import Problem
from flash_attn.backends import cuda, triton

CPU = Problem("cpu", "float32", 64, 64, frozenset({"causal"}))
GPU = Problem("cuda", "bfloat16", 64, 64, frozenset({"causal", "gqa"}), capability=(9, 0))
NAMES = [row.name for row in _support.BACKENDS]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in _env.VARIABLES:
        for name in (variable.name, *variable.aliases):
            monkeypatch.delenv(name, raising=False)
    # As in the pure package without Triton, whatever was built or installed here.
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    monkeypatch.setattr(cuda, "_HOST", None)
    monkeypatch.setattr(cuda, "_WHY_NOT_LOADED", "this installation has no compiled kernels")


@pytest.fixture
def _built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where both GPU backends are there."""
    monkeypatch.setattr(cuda, "why_not", lambda problem: [])
    monkeypatch.setattr(triton, "why_not", lambda problem: [])


def reasons(problem: Problem) -> dict[str, str]:
    return {name: "; ".join(why) for name, why in backends.explain(problem)}


# --- Without settings ---------------------------------------------------------------------------


def test_every_backend_is_explained_best_first() -> None:
    for problem in (CPU, GPU):
        assert [name for name, _ in backends.explain(problem)] == NAMES


def test_cpu_tensors_run_on_the_cpu_backend() -> None:
    assert backends.choose(CPU) == "cpu"
    told = reasons(CPU)
    assert told["cpu"] == ""
    assert "takes cuda tensors, not cpu" in told["cuda"]
    assert "takes float16, bfloat16, float8_e4m3fn, not float32" in told["cuda"]
    assert "takes cuda, xpu tensors, not cpu" in told["triton"]


def test_gpu_tensors_without_a_gpu_backend_are_an_error_that_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError) as caught:
        backends.choose(GPU)
    message = str(caught.value)
    assert "cuda (cc 9.0) bfloat16 head_dim 64: causal gqa" in message
    for name in NAMES:
        assert re.search(rf"^  {name}: \S", message, re.MULTILINE), message
    assert "takes cpu tensors, not cuda" in message
    assert "hint: " in message
    assert "pip install" in message
    assert "`.cpu()`" in message
    assert "python -m flash_attn" in message


@pytest.mark.usefixtures("_built")
def test_the_best_backend_that_fits_is_taken() -> None:
    assert backends.choose(GPU) == "cuda"
    assert backends.choose(CPU) == "cpu"
    xpu = Problem("xpu", "float16", 64, 64)
    assert backends.choose(xpu) == "triton"


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("dtype", ["float32", "float64", "int8"])
def test_a_dtype_no_gpu_backend_takes_is_told(dtype: str) -> None:
    problem = Problem("cuda", dtype, 64, 64)
    with pytest.raises(RuntimeError, match=f"takes float16, bfloat16, not {dtype}"):
        backends.choose(problem)


def test_a_feature_that_a_backend_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    row = _support.backend_support("cpu")
    narrow = _support.BackendSupport(
        row.name, row.device_types, row.dtypes, row.features - {"causal", "alibi"}, row.note
    )
    monkeypatch.setattr(_support, "BACKENDS", (*_support.BACKENDS[:-1], narrow))
    assert reasons(CPU)["cpu"] == "lacks causal"
    with pytest.raises(RuntimeError, match="cpu: lacks causal"):
        backends.choose(CPU)


# (head dims, features, capability, what the CUDA backend has against it)
ELSEWHERE = "has kernels for qv, and V wider than 256, on compute capability 9.0 alone (H100, H200)"
LATENT = [
    ((64, 512), {"qv"}, (8, 0), ELSEWHERE),
    ((64, 128), {"qv", "paged_kv"}, (10, 0), ELSEWHERE),
    ((64, 264), {"causal"}, (8, 9), ELSEWHERE),
    ((128, 128), {"qv"}, (9, 0),
     "takes qv, and V wider than 256, beside head dims of q and k up to 64, not 128"),
    ((64, 512), {"backward"}, (9, 0), "lacks backward with qv or V wider than 256"),
    ((64, 512), {"dropout"}, (9, 0), "lacks dropout with qv or V wider than 256"),
    ((64, 512), {"qv", "fp8"}, (9, 0), "lacks fp8 with qv or V wider than 256"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dims", "features", "capability", "told"),
    LATENT,
    ids=[f"{x[0]}-{sorted(x[1])}" for x in LATENT],
)
def test_what_keeps_latent_attention_from_a_gpu_is_told(
    dims: tuple[int, int],
    features: set[str],
    capability: tuple[int, int],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "_HOST", object())  # kernels of which nobody asks more
    problem = Problem("cuda", "bfloat16", *dims, frozenset(features), capability)
    assert reasons(problem)["cuda"] == told
    with pytest.raises(RuntimeError, match=re.escape(told)) as caught:
        backends.choose(problem)
    hint = str(caught.value).split("hint: ")[1]
    assert "`.cpu()`" in hint
    assert "Triton" not in hint
    assert ("run it on a GPU of compute capability 9.0" in hint) == (told == ELSEWHERE)
    assert ("build the CUDA kernels" in hint) == (told != ELSEWHERE)


# --- FLASH_ATTN_BACKEND -------------------------------------------------------------------------

# (FLASH_ATTN_BACKEND, FLASH_ATTENTION_USE_FLAGGEMS, problem, backend), both GPU backends built.
CHOICES = [
    ("auto", "", GPU, "cuda"),
    ("auto", "TRUE", GPU, "triton"),
    ("auto", "true", GPU, "triton"),
    ("auto", "FALSE", GPU, "cuda"),
    ("auto", "TRUE", CPU, "cpu"),
    ("auto", "FALSE", CPU, "cpu"),
    ("", "TRUE", GPU, "triton"),
    ("cuda", "TRUE", GPU, "cuda"),
    ("triton", "FALSE", GPU, "triton"),
    ("TRITON", "", GPU, "triton"),
    ("cpu", "", CPU, "cpu"),
    ("cpu", "TRUE", CPU, "cpu"),
]


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(
    ("forced", "flaggems", "problem", "chosen"),
    CHOICES,
    ids=[f"{f or 'unset'}-{g or 'unset'}-{p.device_type}" for f, g, p, _ in CHOICES],
)
def test_the_environment_chooses(
    forced: str,
    flaggems: str,
    problem: Problem,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASH_ATTN_BACKEND", forced)
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", flaggems)
    assert backends.choose(problem) == chosen


# (variable, value, problem, what is told): the backend asked for cannot, and no other steps in.
REFUSALS = [
    ("FLASH_ATTN_BACKEND", "cpu", GPU, "cpu: takes cpu tensors, not cuda"),
    ("FLASH_ATTN_BACKEND", "cuda", CPU, "cuda: takes cuda tensors, not cpu"),
    ("FLASH_ATTN_BACKEND", "triton", CPU, "triton: takes cuda, xpu tensors, not cpu"),
    ("FLASH_ATTN_BACKEND", "cuda", CPU, "cpu: FLASH_ATTN_BACKEND=cuda asks for another"),
]


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(
    ("variable", "value", "problem", "told"),
    REFUSALS,
    ids=[r[1] + "-" + r[3][:5] for r in REFUSALS],
)
def test_no_backend_steps_in_for_the_one_asked_for(
    variable: str, value: str, problem: Problem, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=re.escape(told)) as caught:
        backends.choose(problem)
    # The remedy is about the setting: CPU tensors need no `.cpu()`.
    if problem is CPU:
        assert "`.cpu()`" not in str(caught.value)
        assert variable in str(caught.value).split("hint: ")[1]


@pytest.mark.parametrize(
    ("flaggems", "other", "kind"), [("TRUE", cuda, ImportError), ("FALSE", triton, RuntimeError)]
)
def test_flaggems_does_not_fall_back(
    flaggems: str, other: Any, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other, "why_not", lambda problem: [])
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", flaggems)
    with pytest.raises(kind, match=f"FLASH_ATTENTION_USE_FLAGGEMS={flaggems}"):
        backends.choose(GPU)


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(("text", "chosen"), [("TRUE", "triton"), ("FALSE", "cuda")])
def test_the_switch_of_the_rocm_build_means_the_same(
    text: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", text)
    assert backends.choose(GPU) == chosen
    told = {"triton": "cuda", "cuda": "triton"}[chosen]
    assert reasons(GPU)[told] == f"FLASH_ATTENTION_TRITON_AMD_ENABLE={text} asks for another"
    assert backends.choose(CPU) == "cpu"


# --- Triton -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [("FLASH_ATTN_BACKEND", "triton"), ("FLASH_ATTENTION_USE_FLAGGEMS", "TRUE")],
)
def test_a_missing_triton_is_an_import_error_that_says_what_to_install(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ImportError, match="triton: Triton is not installed") as caught:
        backends.choose(GPU)
    assert "pip install 'triton" in str(caught.value).split("hint: ")[1]


def test_without_compiled_kernels_triton_serves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "is_installed", lambda: True)
    assert backends.choose(GPU) == "triton"
    wide = Problem("cuda", "float16", 64, 512)
    assert reasons(wide)["triton"] == "takes head dims up to 256, not 512"


def test_only_a_forced_interpreter_takes_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "is_installed", lambda: True)
    problem = Problem("cpu", "float16", 64, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose(problem) == "cpu"
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "triton")
    assert backends.choose(problem) == "triton"
    with pytest.raises(RuntimeError, match="takes float16, bfloat16, not float32"):
        backends.choose(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="takes cuda, xpu tensors, not cpu"):
        backends.choose(problem)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLASH_ATTN_BACKEND", "gpu"),
        ("FLASH_ATTENTION_USE_FLAGGEMS", "yes"),
        ("FLASH_ATTN_LOG", "2"),
    ],
)
def test_an_unknown_value_stops_the_call(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(1, 2, 1, 8)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} is set to '{value}'; it must be one of"):
        flash_attn.flash_attn_func(x, x, x)


# --- Through a call -----------------------------------------------------------------------------


def test_a_forced_backend_that_cannot_is_an_error_of_the_function_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.zeros(1, 2, 1, 8)
    assert flash_attn.flash_attn_func(x, x, x).shape == x.shape
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"^flash_attn_func: no backend"):
        flash_attn.flash_attn_func(x, x, x)
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "cpu")
    assert flash_attn.flash_attn_func(x, x, x).shape == x.shape


@pytest.mark.parametrize(
    ("call", "features"),
    [
        (lambda x: flash_attn.flash_attn_func(x, x, x), ""),
        (lambda x: flash_attn.flash_attn_func(x, x, x, causal=True, softcap=2.0), "causal softcap"),
        (lambda x: flash_attn.flash_attn_func(x, x, x, window_size=(3, 1)), "window"),
        (lambda x: flash_attn.flash_attn_func(x, x, x, window_size=(3, 0)), "causal window"),
        (lambda x: flash_attn.flash_attn_func(x, x, x, 0.5), "dropout"),
        (lambda x: flash_attn.flash_attn_func(x, x[:, :, :1], x[:, :, :1]), "gqa"),
        (lambda x: flash_attn.flash_attn_with_kvcache(x, x, x, cache_seqlens=1), "seqused"),
        (
            lambda x: flash_attn.flash_attn_with_kvcache(
                x, x.clone(), x.clone(), x, x, cache_seqlens=0
            ),
            "kv_append seqused",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_call_asks_for_the_features_it_uses(
    call: Any, features: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASH_ATTN_LOG", "1")
    backends._log_once.cache_clear()
    call(torch.zeros(2, 4, 2, 8))
    line = capsys.readouterr().err.strip()
    assert line.endswith(f"on cpu: cpu float32 head_dim 8: {features or 'plain forward'}")


def test_the_log_has_one_line_for_a_distinct_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.zeros(1, 2, 1, 8).requires_grad_()
    flash_attn.flash_attn_func(x, x, x)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FLASH_ATTN_LOG", "1")
    backends._log_once.cache_clear()
    for _ in range(3):
        flash_attn.flash_attn_func(x, x, x).sum().backward()
        flash_attn.flash_attn_func(x, x, x, causal=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("flash_attn: flash_attn::_flash_attn_") for line in lines)
    assert [line.split(": ")[-1] for line in lines] == ["plain forward", "backward", "causal"]


def test_the_cpu_backend_has_every_feature() -> None:
    assert _support.backend_support("cpu").features == _support.FEATURE_NAMES


def test_a_problem_prints_as_words() -> None:
    assert str(Problem("cpu", "float32", 64, 64)) == "cpu float32 head_dim 64: plain forward"
    assert str(Problem("cuda", "float16", 64, 128, frozenset({"gqa", "alibi"}), (8, 6))) == (
        "cuda (cc 8.6) float16 head_dim 64/128: alibi gqa"
    )
