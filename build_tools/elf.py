"""Reads what the dynamic linker reads of a 64-bit ELF file, and what a cubin was compiled for."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from build_tools.arch import Arch

X86_64, AARCH64, CUDA = 62, 183, 190
_SYMTAB, _DYNAMIC, _DYNSYM = 2, 6, 11
_VERNEED, _VERSYM = 0x6FFFFFFE, 0x6FFFFFFF
_NEEDED, _RPATH, _RUNPATH = 1, 15, 29
_WEAK = 2
# A cubin's notes on compatibility: attributes of 4 bytes, and after a sized one its bytes.
_COMPAT, _SIZED, _FOR_ONE_ARCH = 0x70000086, 4, 9

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_ATTRIBUTE = struct.Struct("<BBH")


class ElfError(ValueError):
    """A file that cannot be read as ELF."""


@dataclass(frozen=True)
class Symbol:
    """A symbol of a table; `version` is that of the library which defines it, e.g. GLIBC_2.14."""

    name: str
    is_defined: bool
    is_weak: bool
    version: str = ""


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True)
class Elf:
    """What a file says of itself.

    Args:
        is_for_one_arch: of a cubin from CUDA 13, whose flags no longer tell.
    """

    machine: int
    os_abi: int
    flags: int
    needed: tuple[str, ...]
    run_path: str
    symbols: tuple[Symbol, ...]
    is_for_one_arch: bool = False

    @property
    def defined(self) -> frozenset[str]:
        """Names that others may use."""
        return frozenset(symbol.name for symbol in self.symbols if symbol.is_defined)

    @property
    def wanted(self) -> tuple[Symbol, ...]:
        """What others must define."""
        return tuple(symbol for symbol in self.symbols if not symbol.is_defined)

    def newer_than(self, limits: Mapping[str, str]) -> list[str]:
        """Versions it asks for beyond the limits, e.g. GLIBC_2.32 where {"GLIBC": "2.28"}.

        A library without a limit, as those with versions of their own, counts as beyond.
        """
        asked = {symbol.version for symbol in self.wanted if symbol.version}
        return sorted(version for version in asked if not _is_within(version, limits))

    @property
    def arch(self) -> Arch:
        """What a cubin was compiled for, in the layouts of CUDA 12 and 13."""
        if self.machine != CUDA:
            raise ElfError(f"machine {self.machine} is not CUDA's")
        # 0x33: the layout of CUDA 12, which uses the other one for architectures from 10.0 on.
        is_old = self.os_abi == 0x33
        number = (self.flags if is_old else self.flags >> 8) & 0xFF
        is_flagged = self.flags & (0x800 if is_old else 0x8) != 0
        return Arch(number, "a" if is_flagged or self.is_for_one_arch else "")


def _is_within(version: str, limits: Mapping[str, str]) -> bool:
    name, _, number = version.partition("_")
    limit = limits.get(name)
    if limit is None or not number.replace(".", "").isdecimal():
        return False
    return _numbers(number) <= _numbers(limit)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def read(file: Union[Path, bytes]) -> Elf:
    """Reads a file, or its bytes; ElfError if it is none."""
    if isinstance(file, bytes):
        return _parsed(file)
    with file.open("rb") as opened:
        if opened.seek(0, 2) == 0:
            raise ElfError("it is empty")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parsed(data)


def _parsed(data: Union[bytes, mmap.mmap]) -> Elf:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ElfError("it is no 64-bit little-endian ELF file")
    try:
        return _Reader(data).read()
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise ElfError(f"it is damaged: {error}") from None


class _Reader:
    """One file while it is read."""

    def __init__(self, data: Union[bytes, mmap.mmap]) -> None:
        self._data = data
        self._sections = list(self._read_sections())

    def read(self) -> Elf:
        dynamic = self._dynamic()
        table = self._first(_DYNSYM) or self._first(_SYMTAB)
        return Elf(
            machine=self._number("<H", 18),
            os_abi=self._data[7],
            flags=self._number("<I", 48),
            needed=tuple(dynamic.get(_NEEDED, [])),
            run_path="".join(dynamic.get(_RUNPATH, dynamic.get(_RPATH, []))),
            symbols=tuple(self._symbols(table)) if table else (),
            is_for_one_arch=self._is_for_one_arch(),
        )

    def _number(self, form: str, offset: int) -> int:
        return int(struct.unpack_from(form, self._data, offset)[0])

    def _read_sections(self) -> Iterator[_Section]:
        offset, size, count = self._number("<Q", 40), *struct.unpack_from("<HH", self._data, 58)
        for index in range(count):
            at = offset + index * size
            _, kind, _, _, start, length, link, *_ = _SECTION.unpack_from(self._data, at)
            yield _Section(kind, start, length, link)

    def _first(self, kind: int) -> Optional[_Section]:
        return next((section for section in self._sections if section.kind == kind), None)

    def _bytes(self, section: _Section) -> bytes:
        return bytes(self._data[section.offset : section.offset + section.size])

    def _strings(self, section: _Section) -> bytes:
        return self._bytes(self._sections[section.link])

    def _dynamic(self) -> dict[int, list[str]]:
        """The entries of the dynamic section whose value is a text."""
        found: dict[int, list[str]] = {}
        section = self._first(_DYNAMIC)
        if section is None:
            return found
        strings = self._strings(section)
        for tag, value in struct.iter_unpack("<QQ", self._bytes(section)):
            if tag in (_NEEDED, _RPATH, _RUNPATH):
                found.setdefault(tag, []).append(_text(strings, value))
        return found

    def _symbols(self, table: _Section) -> Iterator[Symbol]:
        strings = self._strings(table)
        names, numbers = self._versions(), self._first(_VERSYM)
        has_versions = numbers is not None and table.kind == _DYNSYM
        indices = struct.iter_unpack("<H", self._bytes(numbers)) if numbers else iter(())
        for name, info, _, section, _, _ in _SYMBOL.iter_unpack(self._bytes(table)):
            version = names.get(next(indices)[0] & 0x7FFF, "") if has_versions else ""
            text = _text(strings, name)
            if text and (info >> 4 or table.kind == _SYMTAB):
                yield Symbol(text, section != 0, info >> 4 == _WEAK, version)

    def _is_for_one_arch(self) -> bool:
        section = self._first(_COMPAT)
        at, end = (section.offset, section.offset + section.size) if section else (0, 0)
        while at < end:
            form, attribute, value = _ATTRIBUTE.unpack_from(self._data, at)
            if attribute == _FOR_ONE_ARCH:
                return value != 0
            at += _ATTRIBUTE.size + (value if form == _SIZED else 0)
        return False

    def _versions(self) -> dict[int, str]:
        """Names of versions by their index: those asked of other libraries."""
        section = self._first(_VERNEED)
        if section is None:
            return {}
        data, strings, found = self._bytes(section), self._strings(section), {}
        at, more = 0, True
        while more:
            _, count, _, first, step = struct.unpack_from("<HHIII", data, at)
            inner = at + first
            for _ in range(count):
                _, _, index, name, skip = struct.unpack_from("<IHHII", data, inner)
                found[index & 0x7FFF] = _text(strings, name)
                inner += skip
            at, more = at + step, step != 0
        return found


def _text(strings: bytes, offset: int) -> str:
    return strings[offset : strings.index(b"\0", offset)].decode()
