"""Downloads that go on where they were cut off, and that leave a whole file or none.

Of http, https, file: addresses and folders. Proxies are those that the environment names, and so
are certificates; see `FLASH_ATTN_WHEEL_MIRROR` in flash_attn/_env.py.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, Optional
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from build_tools.manifest import sha256
from build_tools.messages import log
from build_tools.ninja import BuildError
from build_tools.paths import env

TIMEOUT = 30.0
# Pauses before another try; a download that got further starts to count anew.
PAUSES = (0.5, 1.0, 2.0, 4.0)
BLOCK = 1 << 18
PROGRESS_SECONDS = 2.0
_WORTH_ANOTHER_TRY = {408, 425, 429, 500, 502, 503, 504}

Log = Callable[[str], None]


class DownloadError(BuildError):
    """What cannot be downloaded, and why."""


class _CutOffError(Exception):
    """A failure of the network that may not come again."""


def scheme(text: str) -> str:
    """The scheme of an address; empty for a folder. DownloadError for a text that is neither."""
    try:
        found = urlsplit(text).scheme.lower()
    except ValueError as error:
        raise DownloadError(f"{shown(text)} is no address: {error}") from None
    # One letter is a drive of Windows.
    return found if len(found) > 1 else ""


def address(text: str) -> str:
    """An address or a folder as a base for `urljoin`.

    Raises:
        DownloadError: it is plain HTTP, which anybody on the way can change, to another machine;
            or it begins at the current folder, which is the installer's own.
    """
    found = scheme(text)
    folder = Path(text).expanduser()
    is_absolute = urlsplit(text).path.startswith("/") if found else folder.is_absolute()
    if found in ("", "file") and not is_absolute:
        raise DownloadError(
            f"{text}: a folder must be absolute, such as /srv/mirror; installers build in folders "
            "of their own, where a relative one would be looked for"
        )
    if not found:
        return folder.as_uri().rstrip("/") + "/"
    if found not in ("http", "https", "file"):
        raise DownloadError(f"{shown(text)}: must be https, file: or a folder, not {found}")
    if found == "http" and not _is_loopback(urlsplit(text).hostname or ""):
        raise DownloadError(
            f"{shown(text)}: plain HTTP can be changed by anybody on the way; use https, or copy "
            "the mirror and name its folder"
        )
    return text.rstrip("/") + "/"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown(url: str) -> str:
    """An address without the password that it may hold."""
    return re.sub(r"^((?:[\w+.-]+:)?//)[^/?#]*@", r"\1", url)


def join(base: str, path: str) -> str:
    """The address of a file below a base."""
    return urljoin(base, quote(path, safe="/+"))


def read(url: str) -> bytes:
    """A small file."""
    blocks: list[bytes] = []

    def attempt() -> None:
        blocks.clear()
        with _open(url, 0) as response:
            blocks.extend(_blocks(response))

    _persist(url, attempt, lambda: 0)
    return b"".join(blocks)


def fetch(url: str, target: Path, size: int, digest: str, tell: Log = log) -> Path:
    """A file of known size and hash; `target` appears when it is whole and right.

    What was downloaded before a failure stays beside it under another name, and the next call goes
    on from there.
    """
    part = target.with_name(f".{target.name}.part")
    progress = _Progress(target.name, size, tell)

    def attempt() -> None:
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        if have < size:
            with _open(url, have) as response:
                if have and response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    part.unlink()
                    raise _CutOffError(f"it has nothing after {have} bytes")
                # A server that knows no ranges answers 200 and starts anew.
                mode = "ab" if have and response.status == HTTPStatus.PARTIAL_CONTENT else "wb"
                with part.open(mode) as sink:
                    _copy(response, sink, progress)
            have = part.stat().st_size
        if have < size:
            raise DownloadError(f"{shown(url)}: it ends after {have} of {size} bytes")

    try:
        _persist(url, attempt, lambda: part.stat().st_size if part.exists() else 0, tell)
        found = sha256(part)
        if part.stat().st_size != size or found != digest:
            part.unlink()
            raise DownloadError(
                f"{shown(url)}: its sha256 is {found}, and {digest} is expected; the file was "
                "changed or damaged, and nothing of it is kept"
            )
        part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink()  # on a full disk it would be in the way
        raise DownloadError(f"{target} cannot be written: {error.strerror or error}") from None
    return target


def _persist(
    url: str, attempt: Callable[[], None], done: Callable[[], int], tell: Optional[Log] = None
) -> None:
    """Tries until it works, the failure cannot pass, or several tries brought nothing."""
    tries, before = 0, done()
    while True:
        try:
            return attempt()
        except _CutOffError as error:
            tries, before = (0 if done() > before else tries), done()
            if tries == len(PAUSES):
                raise DownloadError(
                    f"{shown(url)}: {error}, also after {tries} more tries"
                ) from None
            if tell is not None:
                tell(f"{shown(url)}: {error}; trying again")
            time.sleep(PAUSES[tries])
            tries += 1


def _open(url: str, start: int) -> Any:
    """The response of a request; raises `_CutOffError` or DownloadError."""
    parts = urlsplit(url)
    request = urllib.request.Request(
        urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])),
        headers={"User-Agent": "flash-attn-build", "Accept-Encoding": "identity"},
    )
    if start:
        request.add_header("Range", f"bytes={start}-")
    if parts.username:
        words = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        credentials = base64.b64encode(words).decode()
        # Not sent on to wherever a redirect leads.
        request.add_unredirected_header("Authorization", f"Basic {credentials}")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT, context=_certificates())
        address(response.url)  # a redirect may not lead to plain HTTP either
        return response
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return error
        error.close()
        text = f"HTTP status {error.code} {error.reason}"
        if error.code in _WORTH_ANOTHER_TRY:
            raise _CutOffError(text) from None
        raise DownloadError(f"{shown(url)}: {text}") from None
    except urllib.error.URLError as error:
        if parts.scheme == "file" or isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{shown(url)}: {_reason(error)}") from None
        raise _CutOffError(_reason(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _CutOffError(str(error) or type(error).__name__) from None


def _reason(error: urllib.error.URLError) -> str:
    told = error.reason
    if isinstance(told, ssl.SSLCertVerificationError):
        return f"{told.verify_message}; {env.PIP_CERT.name} names a file of certificates"
    return (told.strerror if isinstance(told, OSError) else None) or str(told)


def _certificates() -> Optional[ssl.SSLContext]:
    """The certificates that the environment names; None for the system's."""
    file = env.PIP_CERT.text()
    if file is None:
        return None
    try:
        if Path(file).is_dir():
            return ssl.create_default_context(capath=file)
        return ssl.create_default_context(cafile=file)
    except OSError as error:
        names = " or ".join((env.PIP_CERT.name, *env.PIP_CERT.aliases))
        raise DownloadError(f"{file}, set by {names}: {error.strerror or error}") from None


def _blocks(response: Any) -> Iterator[bytes]:
    """What a response holds; failures of the network as `_CutOffError`."""
    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _CutOffError(str(error) or type(error).__name__) from None
        if not block:
            break
        yield block
    # What is left of the length that was announced.
    if getattr(response, "length", None):
        raise _CutOffError("the connection ended early")


def _copy(response: Any, sink: IO[bytes], progress: _Progress) -> None:
    for block in _blocks(response):
        sink.write(block)
        progress.at(sink.tell())


class _Progress:
    """A line from time to time."""

    def __init__(self, name: str, size: int, tell: Log) -> None:
        self._name, self._size, self._tell = name, size, tell
        self._next = time.monotonic() + PROGRESS_SECONDS

    def at(self, done: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_SECONDS
            self._tell(f"{self._name}: {done / 1e6:.1f} of {self._size / 1e6:.1f} MB")
