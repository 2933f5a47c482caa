"""`python -m build_tools serve DIR`: a mirror over HTTP on this machine, to try it.

Answers ranges, so that downloads can go on, and gives an index as JSON to who asks for it. Any
server of static files will do in its place: installers then read the HTML.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import re
import shutil
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, Optional

from build_tools import manifest
from build_tools.index_pages import HTML_TYPE, JSON_TYPE
from build_tools.paths import truth
from build_tools.wheel_name import PROJECT

_RANGE = re.compile(r"bytes=(\d+)-")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with ranges that reach to the end, and JSON for an index."""

    protocol_version = "HTTP/1.1"

    def send_head(self) -> Optional[Any]:
        path = Path(self.translate_path(self.path))
        if path.is_dir() and self.path.partition("?")[0].endswith("/"):
            json_page, html_page = path / "index.json", path / "index.html"
            if json_page.exists() and self._takes_json():
                return self._file(json_page, JSON_TYPE)
            if html_page.exists():
                takes_html = HTML_TYPE in self.headers.get("Accept", "")
                return self._file(html_page, HTML_TYPE if takes_html else "text/html")
        if path.is_file() and _RANGE.fullmatch(self.headers.get("Range", "")):
            return self._range(path)
        return super().send_head()

    def _takes_json(self) -> bool:
        return JSON_TYPE in self.headers.get("Accept", "")

    def _file(self, path: Path, kind: str) -> BinaryIO:
        data = path.read_bytes()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Vary", "Accept")
        self.end_headers()
        return io.BytesIO(data)

    def _range(self, path: Path) -> Optional[BinaryIO]:
        found = _RANGE.fullmatch(self.headers["Range"])
        start, size = int(found[1]) if found else 0, path.stat().st_size
        if start >= size:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return None
        opened = path.open("rb")
        opened.seek(start)
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Length", str(size - start))
        self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        return opened

    def copyfile(self, source: Any, outputfile: Any) -> None:
        shutil.copyfileobj(source, outputfile, 1 << 18)


def server(folder: Path, bind: str = "127.0.0.1", port: int = 0) -> http.server.HTTPServer:
    """A server of a mirror that `serve_forever` starts; port 0 takes a free one."""
    if not (folder / manifest.FILE).exists():
        raise manifest.ManifestError(f"{folder} is no mirror: it has no {manifest.FILE}")
    handler = functools.partial(Handler, directory=str(folder))
    return http.server.ThreadingHTTPServer((bind, port), handler)


def add_parser(commands: Any) -> None:
    """The subcommand with its options."""
    s = commands.add_parser("serve", help="serve a mirror over HTTP on this machine")
    s.add_argument("folder", type=Path, metavar="DIR")
    s.add_argument("--bind", default="127.0.0.1", help="address; default: this machine alone")
    s.add_argument("--port", type=int, default=8000)


def run(options: argparse.Namespace) -> int:
    if not 0 <= options.port < 1 << 16:
        raise ValueError(f"--port is {options.port}; it must be 0 to {(1 << 16) - 1}")
    with server(options.folder, options.bind, options.port) as made:
        url = f"http://{options.bind}:{made.server_address[1]}"
        wanted = f"{PROJECT}=={truth('_version').__version__}"
        print(f"pip install {wanted} --index-url {url}/{manifest.INDEX}", flush=True)
        try:
            made.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
