"""The CUDA backend: loads the compiled shim, if one was built, and says what it can run.

Once loaded, the shim serves the published operators for CUDA tensors without passing through
Python, until it meets a device that it has no kernels for. What comes here is the rest: packed
sequences of torch's own attention, and every call while `FLASH_ATTN_LOG`, `FLASH_ATTN_DEBUG` or
another backend is asked for by the environment at import.
"""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from flash_attn import _arguments, _env, _support
from flash_attn._problem import Append, Backward, Forward, Problem

REMEDY = (
    "build the CUDA kernels for this machine (docs/building.md), or install a release that has "
    "them for this torch (`pip install --force-reinstall --no-deps --no-cache-dir flash-attn`)"
)

_PACKAGE = Path(__file__).resolve().parents[1]
_HOST_LIBRARY = _PACKAGE / "libflash_attn_host.so"
_KERNELS = _PACKAGE / "kernels"
_STABLE = "_shim_stable.so"
# csrc/host/api.h numbers kinds and dtypes in this order.
_KINDS = (
    "forward",
    "combine",
    "append",
    "delta",
    "backward",
    "convert",
    "s_dmask",
    "fill",
    "dq",
    "decode",
)
_DTYPES = (*_support.HALF_DTYPES, _support.FP8_DTYPE)
# Bits of csrc/host/api.h and the features that they stand for.
_FEATURE_BITS = (
    (1, {"causal", "window", "attention_chunk"}),
    (2, {"softcap", "alibi"}),
    (4, {"dropout"}),
    (8, {"paged_kv"}),
    (16, {"qv"}),
)
# Calls with one of these have a cache: few queries over it have kernels of their own, and for FP8
# keys they are there on devices that have no others.
_OF_A_CACHE = {"kv_append", "paged_kv", "seqused", "leftpad", "cache_batch_idx"}
# What a feature needs beyond the kernels of every forward or backward call.
_KINDS_OF_FEATURES = (("kv_append", "append"), ("varlen", "fill"), ("seqused", "fill"))


def shim_file(version: str, cxx11_abi: bool) -> Path:
    """Where the shim for a torch stands: one for all from 2.10 on, before by minor and C++ ABI."""
    major, minor = (int(word) for word in version.split("+")[0].split(".")[:2])
    abi = "TRUE" if cxx11_abi else "FALSE"
    is_stable = (major, minor) >= (2, 10)
    return _PACKAGE / (_STABLE if is_stable else f"_shim_torch{major}_{minor}_cxx11abi{abi}.so")


def _served_torches() -> str:
    """The torches that this installation has shims for, in words; empty if there is none."""
    abis: dict[tuple[int, int], list[str]] = {}
    for file in _PACKAGE.glob("_shim_torch*_cxx11abi*.so"):
        found = re.fullmatch(r"_shim_torch(\d+)_(\d+)_cxx11abi([A-Z]+)\.so", file.name)
        if found is not None:
            abis.setdefault((int(found[1]), int(found[2])), []).append(found[3])
    words = [
        f"{major}.{minor}" + (f" (cxx11abi {only[0]})" if len(only) == 1 else "")
        for (major, minor), only in sorted(abis.items())
    ]
    return ", ".join(words + ["2.10 and later"] * (_PACKAGE / _STABLE).exists())


def _missing(version: str, cxx11_abi: bool) -> str:
    """Why there is no shim for a torch."""
    served = _served_torches()
    if not served:
        return f"this installation has no compiled kernels for torch {version}"
    abi = "TRUE" if cxx11_abi else "FALSE"
    return (
        f"this installation has kernels for torch {served}, not for torch {version} with "
        f"cxx11abi {abi}"
    )


class _LoadError(Exception):
    """A library that is there and does not load; `told` are the system's own words."""

    def __init__(self, words: str, told: object) -> None:
        super().__init__(words)
        self.told = str(told)


def _open(file: Path, made_for: str) -> ctypes.CDLL:
    if not file.exists():
        raise _LoadError(f"this installation is damaged: {file.name} is missing", "")
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        words = f"{file.name} is made for another {made_for}, or damaged"
        raise _LoadError(words, error) from None


def _serves_directly() -> bool:
    """Whether the environment leaves the published operators to the shim alone."""
    try:
        wants_cuda = _env.FLASH_ATTN_BACKEND.get() in ("auto", "cuda")
        return (
            wants_cuda
            and _env.FLASH_ATTENTION_USE_FLAGGEMS.get() is not True
            and not _env.FLASH_ATTN_LOG.get()
            and not _env.FLASH_ATTN_DEBUG.get()
        )
    except ValueError:
        return False  # the first call through Python tells what is wrong


def _load() -> tuple[Optional[ctypes.CDLL], str, str]:
    """(host library behind a loaded shim or None, the reason, the system's words on it)."""
    version, cxx11_abi = torch.__version__, torch.compiled_with_cxx11_abi()
    shim = shim_file(version, cxx11_abi)
    if not shim.exists():
        return None, _missing(version, cxx11_abi), ""
    system = f"system than {platform.system()} on {platform.machine()}"
    try:
        # By its path and first: the shim then takes this one, whatever LD_LIBRARY_PATH has.
        host = _open(_HOST_LIBRARY, system)
        host.flash_last_error.restype = ctypes.c_char_p
        host.flash_kernel_of.restype = ctypes.c_char_p
        library = _open(shim, f"{system}, another build of torch than {version}")
        if not hasattr(library, "flash_attn_stop_serving"):
            raise _LoadError(f"{shim.name} is of another version of this package", "")
        error = _told(library.flash_attn_serve, str(_KERNELS).encode(), int(_serves_directly()))
    except _LoadError as damage:
        return None, str(damage), damage.told
    if error is not None:
        return None, f"the compiled kernels cannot be used: {error}", ""
    return host, "", ""


def _told(function: Any, *arguments: Any) -> Optional[str]:
    """What a function of the shim says went wrong, or None."""
    function.restype = ctypes.c_char_p
    words = function(*arguments)
    return None if words is None else str(words.decode())


# What the system's loader says names paths and symbols: nothing to act on, so only
# `python -m flash_attn` shows it.
_HOST, _WHY_NOT_LOADED, LOADER_SAID = _load()
IS_DIRECT = _HOST is not None and _serves_directly()


def serve_fa3(fwd: str) -> None:
    """Lets the shim run FlashAttention-3's operators for CUDA tensors, where `IS_DIRECT`; `fwd` is
    the name of the published one.
    """
    _serve("flash_attn_serve_fa3", fwd.encode())


def serve_sdpa(is_on: bool) -> None:
    """Lets the shim run dense forward calls of torch's own attention for CUDA tensors, where
    `IS_DIRECT`; or gives them back.
    """
    _serve("flash_attn_serve_sdpa", int(is_on))


def gives_way(device: torch.device) -> bool:
    """Whether the shim has stopped to serve the operators, as there is no kernel for a device: a
    call of it is then to be made again, and goes through Python, which asks the other backends.
    """
    global IS_DIRECT
    if not IS_DIRECT or device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    plain = _KINDS.index("forward"), 64, 0, 10 * major + minor, 0
    if _HOST is None or _HOST.flash_find(*plain):
        return False
    _serve("flash_attn_stop_serving")
    IS_DIRECT = False
    return True


def _serve(function: str, *arguments: Any) -> None:
    if not IS_DIRECT:
        return
    shim = ctypes.CDLL(str(shim_file(torch.__version__, torch.compiled_with_cxx11_abi())))
    error = _told(getattr(shim, function), *arguments)
    if error is not None:
        raise RuntimeError(f"flash_attn: {error}")


def installed() -> str:
    """What this installation has compiled, in words, or why none of it can be used."""
    if _HOST is None:
        return f"none: {_WHY_NOT_LOADED}"
    rows = [line.split() for line in (_KERNELS / "index.txt").read_text("utf-8").splitlines()[1:]]
    archs = sorted({(form == "ptx", int(re.sub(r"\D", "", cc)), cc) for *_, cc, form, _, _ in rows})
    names = ", ".join(f"{cc}+ptx" if is_ptx else cc for is_ptx, _, cc in archs)
    return f"for {names or 'no architecture'}; torch {_served_torches()}"


def is_damaged() -> bool:
    """Whether something compiled stands here and none of it can be used."""
    return _HOST is None and (_KERNELS.exists() or any(_PACKAGE.glob("*.so")))


def remedy(problem: Problem) -> str:
    """What a user may do where this backend does not run a problem."""
    if _is_elsewhere(problem):
        return "run it on a GPU of compute capability {}.{}".format(*_support.LATENT_CAPABILITY)
    return REMEDY


def _is_elsewhere(problem: Problem) -> bool:
    """Whether no build has kernels of latent attention for the problem's device."""
    return problem.is_latent and problem.capability not in (None, _support.LATENT_CAPABILITY)


def why_not(problem: Problem) -> list[str]:
    """What keeps this installation from running a problem on a CUDA device."""
    latent = _why_not_latent(problem) if problem.is_latent else []
    if _HOST is None:
        return [_WHY_NOT_LOADED, *latent]
    if problem.dtype not in _DTYPES or problem.capability is None:
        return []  # the truth table tells
    if latent:
        return latent
    if problem.is_latent and problem.features & _support.backend_support("cuda").not_in_latent:
        return []  # likewise
    kinds = ["delta", "backward", "convert"] if "backward" in problem.features else ["forward"]
    kinds += [kind for feature, kind in _KINDS_OF_FEATURES if feature in problem.features]
    reasons = []
    if "fp8" in problem.features:  # results have 16 bits, so other kinds are those of 16 bits
        kinds = ["decode" if _may_decode(problem) else "forward"]
    dtype = _dtype_of_keys(problem)
    head_dim = max(problem.head_dim, problem.head_dim_v)
    major, minor = problem.capability
    for kind in dict.fromkeys(kinds):
        wanted = (_KINDS.index(kind), head_dim, dtype, 10 * major + minor, _bits(problem))
        if not _HOST.flash_find(*wanted):
            reasons.append(_HOST.flash_last_error().decode())
    return reasons


def _why_not_latent(problem: Problem) -> list[str]:
    """What its device or its sizes have against a second query, or V wider than others."""
    widest, narrow = _support.MAX_HEAD_DIM, _support.NARROW_QK_HEAD_DIM
    what = f"qv, and V wider than {widest},"
    if _is_elsewhere(problem):
        major, minor = _support.LATENT_CAPABILITY
        return [f"has kernels for {what} on compute capability {major}.{minor} alone (H100, H200)"]
    if problem.head_dim > narrow:
        return [f"takes {what} beside head dims of q and k up to {narrow}, not {problem.head_dim}"]
    return []


def _bits(problem: Problem) -> int:
    """The problem's features as csrc/host/api.h has them."""
    return sum(bit for bit, names in _FEATURE_BITS if names & problem.features)


def _dtype_of_keys(problem: Problem) -> int:
    """Its number; queries of 16 bits go with FP8 keys too."""
    return _DTYPES.index(_support.FP8_DTYPE if "fp8" in problem.features else problem.dtype)


def _may_decode(problem: Problem) -> bool:
    """Whether the kernels for few queries over a cache may run an FP8 problem."""
    return problem.dtype != _support.FP8_DTYPE or bool(problem.features & _OF_A_CACHE)


def kernels(problem: Problem) -> list[str]:
    """The kernels that run a problem of usual sizes on a CUDA device: forward, or one query over a
    cache; and backward, if it is asked for.
    """
    if _HOST is None or problem.capability is None:
        return []
    has_cache = problem.features & {"kv_append", "paged_kv"}
    # Latent attention has one kernel for many queries and for few.
    kinds = ["decode" if has_cache and not problem.is_latent else "forward"]
    kinds += ["backward"] * ("backward" in problem.features)
    asked = _bits(problem)
    head_dim = max(problem.head_dim, problem.head_dim_v)
    major, minor = problem.capability
    dtype = _dtype_of_keys(problem)
    cc = 10 * major + minor
    names: list[Optional[bytes]] = [
        _HOST.flash_kernel_of(_KINDS.index(kind), head_dim, dtype, cc, asked) for kind in kinds
    ]
    return [name.decode() for name in names if name is not None]


def forward(call: Forward, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, s_dmask) by the compiled kernels."""
    scores, seqs, mask = call.scores, call.sequences, call.scores.mask
    try:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.flash_attn_cuda.forward(
            call.q,
            call.k,
            call.v,
            call.qv,
            call.out,
            *_append_arguments(call.append),
            seqs.cu_seqlens_q,
            seqs.cu_seqlens_k,
            seqs.seqused_q,
            seqs.seqused_k,
            seqs.leftpad_k,
            seqs.block_table,
            seqs.kv_batch_idx,
            seqs.max_seqlen_q,
            seqs.max_seqlen_k,
            scores.softmax_scale,
            mask.left,
            mask.right,
            mask.chunk,
            scores.softcap,
            scores.alibi_slopes,
            scores.dropout_p,
            scores.rng_state,
            call.return_softmax,
            call.num_splits,
            call.descale.q,
            call.descale.k,
            call.descale.v,
            call.sm_margin,
        )
    except (RuntimeError, ValueError) as error:
        raise _arguments.renamed(error, "flash_attn_cuda::forward", name) from None
    return result


def _append_arguments(append: Optional[Append]) -> tuple[object, ...]:
    if append is None:
        return (None,) * 6 + (True,)
    return (
        append.k,
        append.v,
        append.cu_seqlens,
        append.rotary_cos,
        append.rotary_sin,
        append.rotary_seqlens,
        append.rotary_interleaved,
    )


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over parts of the keys, (splits, b, s, h, d) and (splits, b, s, h).

    Parts without keys carry lse -inf or +inf; what stands in their out_partial is not read.
    """
    if _HOST is None:
        raise RuntimeError(
            f"flash_attn_combine: {_WHY_NOT_LOADED}\nhint: {REMEDY}, or move the tensors to the CPU"
        )
    result: tuple[Tensor, Tensor] = torch.ops.flash_attn_cuda.combine(out_partial, lse_partial)
    return result


def backward(call: Backward, name: str) -> Tensor:
    """softmax_d; the call's dq, dk and dv are written in place."""
    scores, seqs, mask = call.scores, call.sequences, call.scores.mask
    try:
        result: Tensor = torch.ops.flash_attn_cuda.backward(
            call.dout,
            call.q,
            call.k,
            call.v,
            call.out,
            call.softmax_lse,
            call.dq,
            call.dk,
            call.dv,
            seqs.cu_seqlens_q,
            seqs.cu_seqlens_k,
            seqs.seqused_q,
            seqs.seqused_k,
            seqs.max_seqlen_q,
            seqs.max_seqlen_k,
            scores.dropout_p,
            scores.softmax_scale,
            False,
            mask.left,
            mask.right,
            scores.softcap,
            scores.alibi_slopes,
            call.deterministic,
            scores.rng_state,
            call.sm_margin,
        )
    except (RuntimeError, ValueError) as error:
        raise _arguments.renamed(error, "flash_attn_cuda::backward", name) from None
    return result
