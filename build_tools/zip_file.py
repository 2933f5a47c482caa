"""Writes zip files whose bytes depend on their contents alone.

Files are compressed once and written into as many wheels as they are part of: what takes time in a
wheel of kernels is the compressing.
"""

from __future__ import annotations

import base64
import hashlib
import re
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Optional, Union

from build_tools.paths import env

DateTime = tuple[int, int, int, int, int, int]
# The earliest that a zip file can say.
EARLIEST: DateTime = (1980, 1, 1, 0, 0, 0)
# And the first second that none can, 2108-01-01.
TOO_LATE = 4354819200
# What reading one that was damaged raises: bad tables, streams, or methods that nobody has.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
LEVEL = 9
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sBBHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_DEFLATED, _UTF8, _UNIX, _VERSION = 8, 0x800, 3, 20


@dataclass(frozen=True)
class Entry:
    """A file's contents."""

    data: bytes
    is_program: bool = False

    @cached_property
    def packed(self) -> bytes:
        packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        return packer.compress(self.data) + packer.flush()

    @cached_property
    def crc(self) -> int:
        return zlib.crc32(self.data)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def mode(self) -> int:
        return stat.S_IFREG | (0o755 if self.is_program else 0o644)

    @property
    def record(self) -> str:
        """Hash and size, as RECORD has them."""
        digest = base64.urlsafe_b64encode(bytes.fromhex(self.sha256)).rstrip(b"=").decode()
        return f"sha256={digest},{len(self.data)}"


Entries = dict[str, Entry]


def date_time() -> DateTime:
    """The time that every file of a wheel bears: SOURCE_DATE_EPOCH, or the earliest there is."""
    text = env.SOURCE_DATE_EPOCH.text()
    if text is None:
        return EARLIEST
    if not text.isdecimal() or int(text) >= TOO_LATE:
        name = env.SOURCE_DATE_EPOCH.name
        raise ValueError(f"{name} is set to {text!r}; it must be seconds since 1970, before 2108")
    now = time.gmtime(int(text))
    asked = now.tm_year, now.tm_mon, now.tm_mday, now.tm_hour, now.tm_min, now.tm_sec
    return max(EARLIEST, asked)


def write(entries: Entries, order: Iterable[str], when: Optional[DateTime] = None) -> bytes:
    """A zip file with the entries in an order, all of one time."""
    year, month, day, hour, minute, second = when or date_time()
    date, clock = (year - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | second // 2
    body, central, count = BytesIO(), BytesIO(), 0
    for name in order:
        entry, path = entries[name], name.encode()
        flags = 0 if name.isascii() else _UTF8
        sizes = entry.crc, len(entry.packed), len(entry.data)
        common = flags, _DEFLATED, clock, date, *sizes, len(path), 0
        start = body.tell()
        body.write(_LOCAL.pack(b"PK\3\4", _VERSION, *common) + path + entry.packed)
        made = b"PK\1\2", _VERSION, _UNIX, _VERSION
        central.write(_CENTRAL.pack(*made, *common, 0, 0, 0, entry.mode << 16, start) + path)
        count += 1
    start = body.tell()
    size = body.write(central.getvalue())
    body.write(_END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0))
    return body.getvalue()


def read(file: Union[Path, zipfile.ZipFile]) -> Entries:
    """The files of a zip file, in its order."""
    if isinstance(file, Path):
        with zipfile.ZipFile(file) as opened:
            return read(opened)
    return {
        info.filename: Entry(file.read(info), bool(info.external_attr >> 16 & stat.S_IXUSR))
        for info in file.infolist()
        if not info.is_dir()
    }


def wheel_order(entries: Entries) -> list[str]:
    """Names in the order of a wheel: sorted, its own folder of metadata last, RECORD at the end."""

    def key(name: str) -> tuple[bool, bool, str]:
        is_metadata = re.match(r"[^/]+\.dist-info/", name) is not None
        return is_metadata, is_metadata and name.endswith("/RECORD"), name

    return sorted(entries, key=key)
