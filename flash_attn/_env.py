"""Every environment variable the package reads: the only file that touches `os.environ`.

Each variable is a module-level `Variable` under its own name, and `VARIABLES` lists them all; the
table in README.md is rendered from it. Values are read when asked for, not at import, so a program
may set one between two calls. Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Optional, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable, with the texts it accepts and what each of them means.

    An unset or empty variable gives `default`. Texts are compared without regard to case. A
    variable may be known under older names too (`aliases`); its own name is read first.
    """

    name: str
    default: T
    choices: Mapping[str, T]
    doc: str
    aliases: tuple[str, ...] = ()

    def get(self) -> T:
        """The value now in force; ValueError if the text set is not one of `choices`."""
        found = self.setting()
        return self.default if found is None else self._parse(*found)

    def setting(self) -> Optional[tuple[str, str]]:
        """The name it is set under and the text set, or None."""
        for name in (self.name, *self.aliases):
            text = os.environ.get(name, "").strip()
            if text:
                return name, text
        return None

    def _parse(self, name: str, text: str) -> T:
        for choice, value in self.choices.items():
            if choice.lower() == text.lower():
                return value
        allowed = ", ".join(self.choices)
        raise ValueError(f"{name} is set to {text!r}; it must be one of: {allowed}, or be unset")

    @property
    def default_text(self) -> str:
        """The choice that says what the default says, or "unset" where none does."""
        return next(
            (text for text, value in self.choices.items() if value == self.default), "unset"
        )


def _choices(*texts: str) -> Mapping[str, str]:
    return MappingProxyType({text: text for text in texts})


FLASH_ATTN_BACKEND: Variable[str] = Variable(
    name="FLASH_ATTN_BACKEND",
    default="auto",
    choices=_choices("auto", "cpu", "cuda", "triton"),
    doc="Backend to run. `auto` takes the best one that serves the call; a name forces that "
    "backend, and a call which it cannot serve is an error that says why.",
)

FLASH_ATTENTION_USE_FLAGGEMS: Variable[Optional[bool]] = Variable(
    name="FLASH_ATTENTION_USE_FLAGGEMS",
    default=None,
    choices=MappingProxyType({"TRUE": True, "FALSE": False}),
    doc="Which backend serves GPU tensors: `TRUE` the Triton one, `FALSE` the CUDA one, unset the "
    "best one there is. Read only while `FLASH_ATTN_BACKEND` is `auto`; CPU tensors are not "
    "affected.",
    aliases=("FLASH_ATTENTION_TRITON_AMD_ENABLE",),
)

FLASH_ATTN_LOG: Variable[bool] = Variable(
    name="FLASH_ATTN_LOG",
    default=False,
    choices=MappingProxyType({"0": False, "1": True}),
    doc="`1` writes one line per distinct problem to stderr, saying which backend ran it.",
)

FLASH_ATTN_DEBUG: Variable[bool] = Variable(
    name="FLASH_ATTN_DEBUG",
    default=False,
    choices=MappingProxyType({"0": False, "1": True}),
    doc="`1` has every call on a GPU check, before it runs, the lengths, offsets and page indices "
    "in its tables: one that points outside is a ValueError which says where it stands, as it "
    "always is on the CPU. Without it kernels clamp such values. Each call then waits for the "
    "device. Set it before `flash_attn` is imported; calls under CUDA graph capture are not "
    "checked.",
)

TRITON_INTERPRET: Variable[bool] = Variable(
    name="TRITON_INTERPRET",
    default=False,
    choices=MappingProxyType(
        {"0": False, "1": True, "false": False, "true": True, "off": False, "on": True}
    ),
    doc="Triton's own, which it reads when it is imported: `1` runs its kernels on the CPU, in "
    "numpy, for tests. CPU tensors then go to the Triton backend while `FLASH_ATTN_BACKEND` is "
    "`triton`.",
)

VARIABLES: tuple[Variable[Any], ...] = (
    FLASH_ATTN_BACKEND,
    FLASH_ATTENTION_USE_FLAGGEMS,
    FLASH_ATTN_LOG,
    FLASH_ATTN_DEBUG,
    TRITON_INTERPRET,
)


@dataclass(frozen=True)
class BuildVariable:
    """A variable that only building reads: free text, listed in docs/building.md."""

    name: str
    doc: str
    aliases: tuple[str, ...] = ()

    def setting(self) -> Optional[tuple[str, str]]:
        """The name it is set under and the text set, or None; an empty one counts as unset."""
        for name in (self.name, *self.aliases):
            text = os.environ.get(name, "").strip()
            if text:
                return name, text
        return None

    def text(self) -> Optional[str]:
        """The text set, or None."""
        found = self.setting()
        return None if found is None else found[1]

    def count(self) -> Optional[int]:
        """The positive number set, or None; ValueError for anything else."""
        text = self.text()
        if text is None:
            return None
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"{self.name} is set to {text!r}; it must be a positive number")
        return int(text)

    def is_true(self) -> bool:
        """Whether a switch is on; ValueError for a text that is neither TRUE nor FALSE."""
        text = self.text()
        if text is None:
            return False
        if text.upper() not in ("TRUE", "FALSE"):
            raise ValueError(f"{self.name} is set to {text!r}; it must be TRUE or FALSE")
        return text.upper() == "TRUE"

    def set(self, text: str) -> None:
        """Sets it for this process, as another way to say the same does."""
        os.environ[self.name] = text

    def choice(self, *choices: str) -> str:
        """The one of several words that is set, the first if none is; ValueError for another."""
        text = (self.text() or choices[0]).lower()
        if text not in choices:
            raise ValueError(f"{self.name} is set to {text!r}; it must be {' or '.join(choices)}")
        return text

    def words(self) -> list[str]:
        """The words set, between blanks or commas."""
        return (self.text() or "").replace(",", " ").split()


FLASH_ATTN_BUILD = BuildVariable(
    name="FLASH_ATTN_BUILD",
    doc="What `pip install` does with the sources of a release. `auto`, the default: a wheel of "
    "`FLASH_ATTN_WHEEL_MIRROR`, else it compiles where that is asked for or a GPU is found, else "
    "the package without kernels. `prebuilt`: such a wheel or an error. `source`: it compiles, and "
    "fetches nothing.",
)

FLASH_ATTN_WHEEL_MIRROR = BuildVariable(
    name="FLASH_ATTN_WHEEL_MIRROR",
    doc="Where `pip install` from sources looks for wheels: https or file: addresses, or folders, "
    "of mirrors (docs/mirrors.md), the best first, with blanks or commas between. Unset: nothing "
    "is fetched.",
)

PIP_CERT = BuildVariable(
    name="PIP_CERT",
    doc="A file of certificates for https mirrors. Unset: the system's. Proxies are those of "
    "`HTTPS_PROXY` and `NO_PROXY`.",
    aliases=("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"),
)

FLASH_ATTENTION_SKIP_CUDA_BUILD = BuildVariable(
    name="FLASH_ATTENTION_SKIP_CUDA_BUILD",
    doc="`TRUE`: `pip install` makes the package without kernels, whatever else is set or found.",
)

FLASH_ATTENTION_FORCE_BUILD = BuildVariable(
    name="FLASH_ATTENTION_FORCE_BUILD",
    doc="`TRUE`: `pip install` compiles the kernels or fails, also where no GPU is found.",
)

FLASH_ATTENTION_FORCE_CXX11_ABI = BuildVariable(
    name="FLASH_ATTENTION_FORCE_CXX11_ABI",
    doc="`TRUE`: a shim for torch before 2.10 is compiled for the new C++ ABI, whatever torch "
    "says.",
)

FLASH_ATTN_LOCAL_VERSION = BuildVariable(
    name="FLASH_ATTN_LOCAL_VERSION",
    doc="Text after the version, as in `2.8.3+TEXT`, of what is built from a checkout or folder. "
    "pip refuses it for a source archive, whose file name already says the version.",
)

FLASH_ATTN_CUDA_ARCHS = BuildVariable(
    name="FLASH_ATTN_CUDA_ARCHS",
    doc="Architectures to build kernels for, e.g. `80;90`, `8.0;9.0+PTX` or `Hopper`; `all` takes "
    "every one that the compiler knows. Unset: those of the GPUs here, else all.",
    aliases=("TORCH_CUDA_ARCH_LIST",),
)

MAX_JOBS = BuildVariable(
    name="MAX_JOBS",
    doc="Compiler processes at a time. Unset: as many as cores and memory allow.",
)

NVCC_THREADS = BuildVariable(
    name="NVCC_THREADS",
    doc="nvcc's `--threads` for each process; with NVRTC it has no meaning.",
)

CXX = BuildVariable(
    name="CXX",
    doc="The C++ compiler of the host library and the shims, with options after it, e.g. "
    "`ccache g++`.",
)

CUDA_HOME = BuildVariable(
    name="CUDA_HOME",
    doc="A CUDA toolkit, for `--compiler nvcc` and for disassembly; the default one needs none.",
    aliases=("CUDA_PATH",),
)

SOURCE_DATE_EPOCH = BuildVariable(
    name="SOURCE_DATE_EPOCH",
    doc="The time that files in a wheel of `python -m build_tools build` bear, in seconds since "
    "1970. Unset: the start of 1980.",
)

BUILD_VARIABLES: tuple[BuildVariable, ...] = (
    FLASH_ATTN_BUILD,
    FLASH_ATTN_WHEEL_MIRROR,
    PIP_CERT,
    FLASH_ATTENTION_SKIP_CUDA_BUILD,
    FLASH_ATTENTION_FORCE_BUILD,
    FLASH_ATTENTION_FORCE_CXX11_ABI,
    FLASH_ATTN_LOCAL_VERSION,
    FLASH_ATTN_CUDA_ARCHS,
    MAX_JOBS,
    NVCC_THREADS,
    CXX,
    CUDA_HOME,
    SOURCE_DATE_EPOCH,
)
