"""What the compiler makes of the kernels: every forward kernel, and of the others bf16 and FP8.

Tensor-core products, copies of 16 bytes, and no local memory, for each architecture of the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import machine_code
import pytest
from native_tools import codegen, kernels, needs_nvrtc

from build_tools import compilers, fetch, parts
from build_tools.arch import Arch
from build_tools.matrix import Matrix
from build_tools.ninja import BuildError

# What a kernel of each kind must have: words of SASS, and of PTX. A family may have words of its
# own.
PRODUCT = (r"HMMA\.16816\.F32", r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32")
COPY = (r"LDGSTS\.E\.BYPASS(\.\w+)*\.128$", r"cp\.async\.cg\.shared\.global")
FRAGMENT = (r"LDSM\.16\.M\w*88\.4$", r"ldmatrix\.sync\.aligned\.m8n8\.x4")
LOAD = (r"LDG\.E(\.\w+)*\.128", r"ld\.global(\.\w+)*\.v4")
STORE = (r"STG\.E(\.\w+)*\.128", r"st\.global(\.\w+)*\.v4")
# Products of warpgroups, copies by TMA, barriers that count bytes, registers handed over; none of
# it is compiled to PTX.
WARPGROUPS = (
    (r"UTMALDG\.4D", ""),
    (r"SYNCS\.ARRIVE\.TRANS64", ""),
    (r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT", ""),
    (r"USETMAXREG\.DEALLOC", ""),
    (r"USETMAXREG\.TRY_ALLOC", ""),
)
HOPPER = ((r"HGMMA\.64x\d+x16\.F32", ""), *WARPGROUPS)
# How O leaves, but at head dim 256, and mostly dK or dV.
O_BUFFER = ((r"UTMASTG\.4D", ""), (r"STSM\.16\.M\w*88\.4", ""))
HOPPERS_FORWARD = (*HOPPER, PRODUCT, FRAGMENT, STORE)
# Of calls in parts, these leave unrounded, from registers.
HOPPERS_PARTS = (*HOPPER, PRODUCT, FRAGMENT, (r"STG\.E(\.\w+)*\.64", ""))
# Keys come to two CTAs at once, or one by one; P goes by way of shared memory.
LATENT_FORWARD = (
    *HOPPER,
    COPY,
    (r"UTMALDG\.4D\.MULTICAST", ""),
    (r"STSM\.16\.M\w*88\.4", ""),
    (r"STG\.E(\.\w+)*\.64", ""),
)
# Products of 8-bit elements; V is transposed on its way.
FP8_FORWARD = (
    (r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3", ""),
    (r"F2FP\.SATFINITE\.E4M3\.F32", ""),
    (r"LDSM\.16\.MT88\.4", ""),
    *WARPGROUPS,
    STORE,
)
# Statistics of a block's rows at once.
HOPPERS_BACKWARD = (*HOPPER, STORE, (r"UBLKCP\.S\.G", ""))
# Up to head dim 128: sums of dQ from shared memory, 16 bytes a lane on their way there; dS stored
# transposed.
SUMS = (
    (r"UBLKRED\.G\.S\.ADD\.F32\.RN", ""),
    (r"STS\.128", ""),
    (r"STSM\.16\.MT88\.4", ""),
)
MUST_HAVE = {
    **{f"{family} forward": HOPPERS_FORWARD for family in ("sm90", "sm90_wide", "sm90_narrow")},
    "sm90_scored forward": HOPPERS_PARTS,
    "sm90_latent forward": LATENT_FORWARD,
    **{
        f"{family} forward": FP8_FORWARD
        for family in ("sm90_fp8", "sm90_fp8_wide", "sm90_fp8_scored")
    },
    "sm90 backward": HOPPERS_BACKWARD,
    "sm90_narrow backward": HOPPERS_BACKWARD,
    "forward": (PRODUCT, COPY, FRAGMENT, STORE),
    "backward": (PRODUCT, COPY, FRAGMENT, STORE),
    "delta": (LOAD,),
    "convert": (STORE,),
    "append": (LOAD, STORE),
    "combine": (LOAD,),
    "s_dmask": (PRODUCT,),
    "fill": (STORE,),
    "dq": (*HOPPER, STORE),
    "decode": (PRODUCT, COPY, FRAGMENT, LOAD, STORE),
}
ARITHMETIC = r"HMMA|FADD|FFMA|FMUL|MUFU|F2|LDGSTS|LDSM|REDG?\."
# Copies of other sizes: the backward pass brings 4-byte row statistics too.
OTHER_COPY = (r"LDGSTS(?!\.E\.BYPASS(\.\w+)*\.128$)", r"cp\.async\.ca\.")
MAY_COPY_LESS = ("backward",)
WARPGROUP_PRODUCT_OF_DTYPE = {
    "fp16": r"HGMMA\.\w+\.F32$",
    "bf16": r"HGMMA\.\w+\.F32\.BF16$",
    "e4m3": r"QGMMA\.\w+\.F32\.E4M3\.E4M3$",
}
PRODUCT_OF_DTYPE = {
    "fp16": (PRODUCT[0] + r"$", PRODUCT[1] + r"\.f16\.f16\.f32$"),
    "bf16": (PRODUCT[0] + r"\.BF16$", PRODUCT[1] + r"\.bf16\.bf16\.f32$"),
    "e4m3": ("no product of warps", ""),
}

# Bytes spilled and reloaded, by kind, head dim and architecture: the most that NVRTC 12.8, 12.9,
# 13.0 or 13.5 makes. A number may only shrink.
#
# forward: one word on one architecture; a step stores and loads it once beside its 256 HMMA. No
# other forward kernel has a place here.
# backward: dK and dV fill the registers, and what is spilled stands outside the products: addresses
# and masks of a step. Its speed with these spills is what benchmarks/README.md compares with SDPA.
# decode: O fills the registers at head dim 256; what is spilled is needed between sequences, and a
# step of the loop, which is bound by memory, reloads ten words of it at most.
# delta, append: bound by memory; a few addresses, with some compilers only.
SPILLS = {
    ("forward", 128): {"100": 16},
    ("backward", 64): {"80": 164, "90": 104},
    ("backward", 128): {"80": 56, "90": 40},
    ("backward", 192): {"80": 252, "90": 104},
    ("backward", 256): {"80": 40, "90": 48, "100": 204, "120": 40},
    ("decode", 192): {"80": 156, "90": 12},
    ("decode", 256): {"80": 800, "86": 612, "89": 612, "90": 900},
    ("delta", 0): {"100": 12, "120": 36},
    ("append", 0): {"100": 32, "120": 8},
}

IMAGES = [
    (unit, arch)
    for unit in codegen.units()
    if unit.kind == "forward" or unit.dtype in ("bf16", "e4m3")
    for arch in kernels.archs_of(unit, None)
]


@pytest.fixture(scope="module")
def nvrtc() -> compilers.Nvrtc:
    return needs_nvrtc()


@pytest.mark.parametrize(
    ("unit", "arch"), IMAGES, ids=[f"{unit.symbol}-{arch.flag}" for unit, arch in IMAGES]
)
def test_machine_code_is_what_the_kernel_was_written_for(
    unit: codegen.Unit, arch: Arch, nvrtc: compilers.Nvrtc
) -> None:
    if not nvrtc.supports(arch):
        pytest.skip(f"{nvrtc.identity} does not know {arch.flag}")
    code, log = nvrtc.compile(unit.source, arch)
    assert list(faults(unit, arch, code, log)) == []


@pytest.fixture(scope="module")
def other_nvrtc(nvrtc: compilers.Nvrtc) -> compilers.Nvrtc:
    """Of the two that wheels are compiled with, the one that no extra installs."""
    (cuda,) = (
        cuda
        for cuda in Matrix().facts.cuda.values()
        if tuple(map(int, cuda.toolkit.split("."))) != nvrtc.version
    )
    try:
        return compilers.Nvrtc(fetch.nvrtc(cuda))
    except BuildError as error:
        pytest.skip(str(error))


# With ptxas 12.8 products waited for each other in every forward kernel, and nobody saw it: calls
# took 1.4 to 1.9 times as long.
@pytest.mark.parametrize(
    ("unit", "arch"),
    [image for image in IMAGES if str(image[1]) == "90a"],
    ids=[unit.symbol for unit, arch in IMAGES if str(arch) == "90a"],
)
def test_hoppers_machine_code_is_as_good_by_the_other_compiler(
    unit: codegen.Unit, arch: Arch, other_nvrtc: compilers.Nvrtc
) -> None:
    code, log = other_nvrtc.compile(unit.source, arch)
    assert list(faults(unit, arch, code, log)) == []


def faults(unit: codegen.Unit, arch: Arch, code: bytes, log: str) -> Iterator[str]:
    """What is wrong with an image, in words."""
    found = (machine_code.ptx if arch.is_ptx else machine_code.sass)(code)
    form = 1 if arch.is_ptx else 0
    must_have = MUST_HAVE.get(f"{unit.family} {unit.kind}", MUST_HAVE[unit.kind])
    if must_have in (HOPPERS_FORWARD, HOPPERS_PARTS, FP8_FORWARD) and unit.head_dim < 256:
        must_have += O_BUFFER
    if must_have is HOPPERS_BACKWARD:
        # dK and dV leave from registers where dQ has a consumer of its own, and where the next
        # block of keys comes beside this one.
        must_have += O_BUFFER * (unit.head_dim not in (96, 192)) + SUMS * (unit.head_dim <= 128)
    for wanted in must_have:
        if not machine_code.count(found, wanted[form]):
            yield f"no {wanted[form]}"
    products = machine_code.count(found, PRODUCT[form])
    # Decode kernels make f16 of FP8 keys.
    dtype = "fp16" if (unit.kind, unit.dtype) == ("decode", "e4m3") else unit.dtype
    if products != machine_code.count(found, PRODUCT_OF_DTYPE[dtype][form]):
        yield "a product has another dtype"
    products = machine_code.count(found, "[HQ]GMMA")
    if products != machine_code.count(found, WARPGROUP_PRODUCT_OF_DTYPE[unit.dtype]):
        yield "a product of a warpgroup has another dtype"
    # C7510 and its kin: products that run one after the other, registers that stay where they are.
    yield from re.findall(r".*\bC75\d\d\b.*", log)
    if unit.kind not in MAY_COPY_LESS and machine_code.count(found, OTHER_COPY[form]):
        yield "a copy to shared memory is not of 16 bytes"
    local = machine_code.count(found, r"LDL|STL|(ld|st)\.local")
    facts = parts.facts_of_log(log, 0.0, 0, code)
    allowed = SPILLS.get((unit.kind, unit.head_dim), {}).get(str(arch), 0)
    spilled = facts.spill_stores + facts.spill_loads
    if spilled > allowed:
        yield f"{spilled} bytes are spilled and reloaded; {allowed} are allowed"
    if not allowed and (local or facts.stack):
        yield f"{local} instructions use local memory, {facts.stack} bytes of it"


@pytest.mark.parametrize(("head_dim", "products"), [(64, 28), (96, 20), (128, 28)])
def test_hoppers_backward_loop_reads_no_index_and_does_not_diverge(
    head_dim: int, products: int, nvrtc: compilers.Nvrtc
) -> None:
    # S2R waits behind additions to memory: calls of head dim 128 took up to 12 % longer.
    unit = next(u for u in codegen.units() if u.symbol == f"flash_bwd_sm90_d{head_dim}_bf16")
    code, _ = nvrtc.compile(unit.source, Arch.parse("90a"))
    loop = machine_code.main_loop(code, products)
    assert machine_code.count(loop, "MUFU.EX2") >= 32
    assert machine_code.count(loop, r"S2R|WARPSYNC|BRA\.DIV") == 0


@pytest.mark.parametrize("kernel", ["wide_d128", "d128", "d192", "d256"])
def test_fp8_values_are_turned_without_a_look_at_the_lane(
    kernel: str, nvrtc: compilers.Nvrtc
) -> None:
    # S2R, once 16 head dims, took 3 to 4 % of the time at head dim 256.
    unit = next(u for u in codegen.units() if u.symbol == f"flash_fwd_sm90_fp8_{kernel}_e4m3")
    code, _ = nvrtc.compile(unit.source, Arch.parse("90a"))
    loop = machine_code.main_loop(code, 3, r"LDSM\.16\.MT88")
    assert machine_code.count(loop, "STSM") == machine_code.count(loop, r"LDSM\.16\.MT88")
    assert machine_code.count(loop, r"S2R|BRA\.DIV") == 0


def test_of_the_forward_kernels_one_keeps_one_word_in_memory() -> None:
    # 16 bytes: three stores, of which one is in the loop, and one load.
    assert {key: has for key, has in SPILLS.items() if key[0] == "forward"} == {
        ("forward", 128): {"100": 16}
    }


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("symbol", ["flash_fwd_sm80_d128_bf16", "flash_bwd_sm80_d64_bf16"])
def test_nvrtc_and_nvcc_make_the_same_arithmetic(
    symbol: str, arch: str, nvrtc: compilers.Nvrtc
) -> None:
    # What rounds and what moves data; two versions may order integers and comparisons another way.
    try:
        nvcc = compilers.Nvcc()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if nvcc.version != nvrtc.version:
        pytest.skip(f"{nvcc.identity} and {nvrtc.identity} are different compilers")
    unit = next(unit for unit in codegen.units() if unit.symbol == symbol)
    by_compiler = [
        machine_code.sass(compiler.compile(unit.source, Arch.parse(arch))[0])
        for compiler in (nvrtc, nvcc)
    ]
    ours, theirs = (
        {name: n for name, n in code.items() if re.match(ARITHMETIC, name)} for code in by_compiler
    )
    assert ours == theirs
