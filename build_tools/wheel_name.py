"""File names of wheels: one dataclass writes and reads them.

Standard library only: an installation from source reads names on every supported Python.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

PROJECT, DISTRIBUTION = "flash-attn", "flash_attn"

_VARIANT = re.compile(r"cu(\d+)torch(\d+\.\d+)cxx11abi(TRUE|FALSE)")
_NAME = re.compile(
    DISTRIBUTION + r"-(?P<version>[^-+]+)(?:\+(?P<variant>[^-]+))?"
    r"-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<platform>[^-]+)\.whl"
)


def python_tags(python: str) -> tuple[str, str]:
    """The tags of a Python and of its ABI, for one written as in `3.13t`."""
    if not re.fullmatch(r"3\.\d+t?", python):
        raise ValueError(f"{python!r} is no Python; one is written like 3.12 or 3.13t")
    tag = "cp" + python.rstrip("t").replace(".", "")
    return tag, f"{tag}t" if python.endswith("t") else tag


def has_build_number(text: str) -> bool:
    """Whether a file name bears a build number, as what is compiled for one torch does."""
    return text.count("-") == "name-version-build-python-abi-platform".count("-")


@dataclass(frozen=True)
class Variant:
    """What the published names say after the version: `cu12torch2.8cxx11abiTRUE`."""

    cuda: str
    torch: str
    cxx11abi: str

    @classmethod
    def parse(cls, text: str) -> Variant:
        found = _VARIANT.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no variant; one is written cu12torch2.8cxx11abiTRUE")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"cu{self.cuda}torch{self.torch}cxx11abi{self.cxx11abi}"


@dataclass(frozen=True)
class WheelName:
    """A wheel's file name; `variant` is its local version, which a plain wheel has not."""

    release: str
    python: str
    abi: str
    platform: str
    variant: Optional[Variant] = None

    @classmethod
    def parse(cls, text: str) -> WheelName:
        """The name in a file name; ValueError for any other project's or any other form."""
        found = _NAME.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r} is no wheel of {PROJECT}; one is called like "
                f"{DISTRIBUTION}-2.8.3-py3-none-win_amd64.whl"
            )
        variant = Variant.parse(found["variant"]) if found["variant"] else None
        return cls(found["version"], found["python"], found["abi"], found["platform"], variant)

    @property
    def version(self) -> str:
        """The version with its local part, as METADATA has to repeat it."""
        return f"{self.release}+{self.variant}" if self.variant else self.release

    @property
    def tag(self) -> str:
        """The `Tag:` of the file WHEEL."""
        return f"{self.python}-{self.abi}-{self.platform}"

    def __str__(self) -> str:
        return f"{DISTRIBUTION}-{self.version}-{self.tag}.whl"
