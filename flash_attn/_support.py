"""TRUTH: what can run where. Dispatch, argument checks, `python -m flash_attn`, the tests and the
README tables all read this file. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_DIM = 256
# FlashAttention-3 takes a wider V beside a narrow QK head (the absorbed form of latent attention).
NARROW_QK_HEAD_DIM = 64
MAX_HEAD_DIM_V_OF_NARROW_QK = 512
# V wider than MAX_HEAD_DIM, and `qv`, have CUDA kernels for this compute capability alone.
LATENT_CAPABILITY = (9, 0)

MAX_SPLITS_FA2 = 128
MAX_SPLITS_FA3 = 256

# The published kernels round these sizes up; the shapes of `S_dmask` and `softmax_d` show it.
ROUND_TO = 128

HALF_DTYPES = ("float16", "bfloat16")
FP8_DTYPE = "float8_e4m3fn"


@dataclass(frozen=True)
class Feature:
    """One thing a call can ask for beyond plain softmax(q k^T) v.

    Args:
        name: identifier used in `Problem.features`.
        title: words for tables.
        in_sdpa: whether `torch.nn.functional.scaled_dot_product_attention` offers it without an
            attention mask of size s x s.
    """

    name: str
    title: str
    in_sdpa: bool


FEATURES: tuple[Feature, ...] = (
    Feature("backward", "gradients of q, k, v", True),
    Feature("deterministic", "bitwise reproducible gradients on request", False),
    Feature("gqa", "grouped and multi-query heads (GQA, MQA)", True),
    Feature("causal", "causal mask, aligned to the last key", False),
    Feature("window", "sliding window, both sides", False),
    Feature("alibi", "ALiBi slopes", False),
    Feature("softcap", "softcap", False),
    Feature("dropout", "dropout that a saved state reproduces", True),
    Feature("varlen", "packed sequences (`cu_seqlens`)", False),
    Feature("seqused", "shorter use of longer buffers (`seqused_q`, `seqused_k`)", False),
    Feature("leftpad", "left padding of the cache", False),
    Feature("kv_append", "KV cache with in-place append", False),
    Feature("rotary", "rotary embedding fused into the append", False),
    Feature("cache_batch_idx", "cache rows chosen by index", False),
    Feature("paged_kv", "paged KV cache, any page size", False),
    Feature("head_dim_v", "head dim of V other than that of Q and K", True),
    Feature("attention_chunk", "chunked local attention", False),
    Feature("qv", "second query against V (`qv`)", False),
    Feature("fp8", "FP8 (e4m3) inputs with descale, forward", False),
)
FEATURE_NAMES = frozenset(feature.name for feature in FEATURES)


@dataclass(frozen=True)
class BackendSupport:
    """What one backend of this release runs.

    Args:
        name: value of `FLASH_ATTN_BACKEND`.
        device_types: torch device types it takes.
        dtypes: names of torch dtypes of q, k and v.
        features: names of the features it runs.
        note: one line for tables.
        not_in_fp8: of these, what it does not run with FP8 inputs.
        not_in_latent: of these, what it does not run with `qv`, or V wider than MAX_HEAD_DIM.
    """

    name: str
    device_types: tuple[str, ...]
    dtypes: tuple[str, ...]
    features: frozenset[str]
    note: str
    not_in_fp8: frozenset[str] = frozenset()
    not_in_latent: frozenset[str] = frozenset()


# Best first: `backends.choose` takes the first row that fits.
BACKENDS: tuple[BackendSupport, ...] = (
    BackendSupport(
        "cuda",
        ("cuda",),
        (*HALF_DTYPES, FP8_DTYPE),
        FEATURE_NAMES,
        "compiled CUDA kernels for compute capability 8.0 and later, few queries over an FP8 cache "
        "among them, head dims up to 256, built from source; for 9.0 alone other FP8, qv, and V up "
        "to 512 beside q and k up to 64",
        frozenset({"dropout"}),
        frozenset({"backward", "dropout", "fp8"}),
    ),
    BackendSupport(
        "triton",
        ("cuda", "xpu"),
        HALF_DTYPES,
        FEATURE_NAMES - {"qv", "fp8"},
        "Triton kernels, compiled when first called, for every GPU that the installed Triton "
        "serves, head dims up to 256",
    ),
    BackendSupport(
        "cpu",
        ("cpu",),
        ("float64", "float32", "float16", "bfloat16", FP8_DTYPE),
        FEATURE_NAMES,
        "blockwise, exact, memory linear in sequence length",
    ),
)


def dtypes_of_device(device_type: str) -> tuple[str, ...]:
    """Names of the dtypes that some backend takes on `device_type`, in table order."""
    rows = [row.dtypes for row in BACKENDS if device_type in row.device_types]
    return tuple(dict.fromkeys(dtype for dtypes in rows for dtype in dtypes))


def backend_support(name: str) -> BackendSupport:
    """The row of backend `name`."""
    return next(row for row in BACKENDS if row.name == name)


@dataclass(frozen=True)
class KernelFamily:
    """Kernels of one design: `csrc/device/NAME`, or `csrc/device/common` for every family's.

    Args:
        name: folder and namespace of the device code.
        kinds: what it computes; `build_tools.codegen` has the template of each kind.
        head_dims: widths that kernels are built for, a call takes the next wider one; empty where
            one kernel serves them all.
        dtypes: names of torch dtypes.
        archs: what to compile for, as nvcc's `sm_` and `compute_` names spell it: "90" is code for
            compute capability 9.0 and "80+ptx" is PTX that later devices translate.
    """

    name: str
    kinds: tuple[str, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    archs: tuple[str, ...]


_SINCE_SM80 = ("80", "86", "89", "90", "100", "120", "80+ptx")

# Best first. sm80's code runs on every later architecture too, compiled for it: what sm90 does not
# do (dropout, some pages) stays with it on cc 9.0. sm90_wide and sm90_scored are sm90's code: with
# wider tiles, for long calls; and with softcap, ALiBi, keys in parts and heads that share tiles,
# which sm90's forward leaves out. sm90_narrow is for V of up to 128 columns beside wider Q and K.
# Above head dim 128, sm90's dQ has a kernel of its own.
KERNEL_FAMILIES: tuple[KernelFamily, ...] = (
    KernelFamily("sm90_wide", ("forward",), (64, 96, 128), HALF_DTYPES, ("90a",)),
    KernelFamily("sm90_narrow", ("forward",), (192,), HALF_DTYPES, ("90a",)),
    KernelFamily("sm90", ("forward",), (64, 96, 128, 192, 256), HALF_DTYPES, ("90a",)),
    KernelFamily("sm90_scored", ("forward",), (64, 96, 128, 192, 256), HALF_DTYPES, ("90a",)),
    KernelFamily("sm90_fp8_wide", ("forward",), (128,), (FP8_DTYPE,), ("90a",)),
    KernelFamily("sm90_fp8", ("forward",), (64, 96, 128, 192, 256), (FP8_DTYPE,), ("90a",)),
    KernelFamily("sm90_fp8_scored", ("forward",), (64, 96, 128, 192, 256), (FP8_DTYPE,), ("90a",)),
    KernelFamily("sm90_latent", ("forward",), (256, 512), HALF_DTYPES, ("90a",)),
    KernelFamily("sm90_narrow", ("backward", "dq"), (192,), HALF_DTYPES, ("90a",)),
    KernelFamily("sm90", ("backward", "convert"), (64, 96, 128), HALF_DTYPES, ("90a",)),
    KernelFamily("sm90", ("backward", "dq"), (192, 256), HALF_DTYPES, ("90a",)),
    KernelFamily(
        "sm80",
        ("forward", "backward", "convert"),
        (64, 96, 128, 192, 256),
        HALF_DTYPES,
        _SINCE_SM80,
    ),
    KernelFamily("decode", ("decode",), (64, 96, 128, 192, 256), HALF_DTYPES, _SINCE_SM80),
    KernelFamily("decode_wide", ("decode",), (64, 96, 128, 192, 256), HALF_DTYPES, _SINCE_SM80),
    KernelFamily("decode", ("decode",), (64, 128, 192, 256), (FP8_DTYPE,), _SINCE_SM80),
    KernelFamily("decode_wide", ("decode",), (64, 128, 192, 256), (FP8_DTYPE,), _SINCE_SM80),
    KernelFamily(
        "common",
        ("combine", "append", "delta", "s_dmask", "fill"),
        (),
        HALF_DTYPES,
        _SINCE_SM80,
    ),
)
