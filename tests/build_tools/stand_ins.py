"""Wheels that hold next to nothing, but say what real ones say; servers with faults."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from build_tools import manifest, mirror, serve
from build_tools.wheel_name import WheelName

UNIVERSAL = "whl/flash-attn/flash_attn-2.8.3-py3-none-manylinux_2_28_x86_64.whl"
ARCHS = ("80", "90", "120", "80+ptx")
SBOM = b'{"bomFormat": "CycloneDX"}\n'


def make_wheel(
    folder: Path,
    path: str = UNIVERSAL,
    torch: str = "",
    archs: tuple[str, ...] = ARCHS,
    text: str = "",
    filler: int = 0,
) -> Path:
    """A wheel at a path.

    Args:
        torch: the minor version that METADATA pins, if any.
        text: of its module, so that wheels differ.
        filler: bytes that cannot be compressed.
    """
    name = WheelName.parse(path.rpartition("/")[2])
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    info = f"flash_attn-{name.version}.dist-info"
    requirement = f"torch=={torch}.*" if torch else "torch>=2.4"
    rows = []
    for arch in archs:
        number, _, ptx = arch.partition("+")
        form, flag = ("ptx", "compute") if ptx else ("cubin", "sm")
        rows.append(f"forward sm80 64 fp16 {number} {form} fwd {flag}_{number}/fwd.{form}\n")
    files = {
        "flash_attn/__init__.py": f"text = {text!r}\n".encode(),
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {name.version}\n"
            f"Requires-Python: >=3.9\nRequires-Dist: {requirement}\n\nA stand-in.\n"
        ).encode(),
        f"{info}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {name.tag}\n"
        ).encode(),
        f"{info}/sboms/flash_attn.cdx.json": SBOM,
    }
    if archs:
        index = "flash-attn-kernels 1\n" + "".join(rows)
        files["flash_attn/kernels/index.txt"] = index.encode()
    if filler:
        blocks = (hashlib.sha256(str(i).encode()).digest() for i in range(filler // 32))
        files["flash_attn/filler"] = b"".join(blocks)
    record = "".join(
        f"{entry},sha256={_digest(data)},{len(data)}\n" for entry, data in files.items()
    )
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in files.items():
            archive.writestr(zipfile.ZipInfo(entry), data)
    return file


def make_mirror(folder: Path, wheels: dict[str, str]) -> Path:
    """A mirror of wheels that say which one they are.

    Args:
        wheels: the torch that METADATA pins, if any, by path.
    """
    for path, torch in wheels.items():
        make_wheel(folder / "dist", path, torch, text=path)
    mirror.mirror(str(folder / "dist"), folder / "mirror")
    return folder / "mirror"


def with_a_bad_stream(wheel: bytes) -> bytes:
    """The wheel, with a METADATA that nobody can unpack."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        info = next(x for x in archive.infolist() if x.filename.endswith("/METADATA"))
    start = info.header_offset + 30 + len(info.filename)
    return wheel[:start] + b"\xff" * 8 + wheel[start + 8 :]


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


class Faults:
    """What a server does wrong, by the path of a request; and what it was asked.

    Args:
        status: an answer in place of the file, for so many requests.
        cut: bytes of an answer after which the connection ends, for so many requests.
        stalled: set once a file whose name ends in `stall` is half sent; the rest never comes.
    """

    def __init__(self) -> None:
        self.status: dict[str, tuple[int, int]] = {}
        self.cut: dict[str, tuple[int, int]] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.stall, self.stalled, self.over = "", threading.Event(), threading.Event()

    def take(self, table: dict[str, tuple[int, int]], path: str) -> int:
        """The value that holds for a request now; 0 for none."""
        for end, (value, times) in table.items():
            if path.endswith(end) and times:
                table[end] = (value, times - 1)
                return value
        return 0


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Faults]]:
    """(address, faults) of a mirror that is served on loopback."""
    faults = Faults()

    class Handler(serve.Handler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            header = self.headers.get
            faults.asked.append((self.path, header("Range", ""), header("Authorization", "")))
            status = faults.take(faults.status, self.path)
            if status:
                self.send_error(status)
            else:
                super().do_GET()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            cut = faults.take(faults.cut, self.path)
            if faults.stall and self.path.endswith(faults.stall):
                outputfile.write(source.read(1000))
                outputfile.flush()
                faults.stalled.set()
                faults.over.wait(60)
            elif cut:
                outputfile.write(source.read(cut))
                self.close_connection = True
            else:
                super().copyfile(source, outputfile)

        def log_message(self, *arguments: Any) -> None:
            pass

    assert (folder / manifest.FILE).exists()
    made = serve.http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", faults
    finally:
        faults.over.set()
        made.shutdown()
        thread.join()
        made.server_close()
