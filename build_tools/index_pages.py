"""The pages of an index: PEP 503 HTML, PEP 691 JSON, a find-links page; all made of the manifest.

Links are relative, so a folder serves under any address, and from a disk.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from build_tools.manifest import INDEX, Entry
from build_tools.wheel_name import PROJECT

API = "1.1"
JSON_TYPE = "application/vnd.pypi.simple.v1+json"
HTML_TYPE = "application/vnd.pypi.simple.v1+html"
SUMS = "SHA256SUMS"


def pages(entries: Iterable[Entry]) -> dict[str, str]:
    """Every page by its path, those that others lead to first."""
    roots: dict[str, list[Entry]] = {INDEX: []}
    for entry in sorted(entries, key=lambda entry: entry.path):
        roots.setdefault(entry.root, []).append(entry)
    made: dict[str, str] = {}
    for root, files in roots.items():
        made[f"{root}/{PROJECT}/index.html"] = project_html(files)
        made[f"{root}/{PROJECT}/index.json"] = project_json(files)
        made[f"{root}/find-links.html"] = project_html(files, f"{PROJECT}/")
        made[f"{root}/index.html"] = _page("Index", [_link(f"{PROJECT}/", PROJECT)])
        made[f"{root}/index.json"] = _json({"projects": [{"name": PROJECT}]})
    made["index.html"] = _overview(roots)
    return made


def project_html(entries: Iterable[Entry], base: str = "") -> str:
    """The files of a project; `base` leads to where they stand."""
    links = []
    for entry in entries:
        href = f"{base}{quote(entry.name)}#sha256={entry.sha256}"
        core = f"sha256={entry.metadata_sha256}"
        # Installers read either name, depending on their age.
        attributes = {"data-core-metadata": core, "data-dist-info-metadata": core}
        if entry.requires_python:
            attributes["data-requires-python"] = entry.requires_python
        links.append(_link(href, entry.name, attributes))
    return _page(f"Links for {PROJECT}", links)


def project_json(entries: Iterable[Entry]) -> str:
    """The same as JSON."""
    listed = list(entries)
    files = [
        {
            "filename": entry.name,
            "url": quote(entry.name),
            "hashes": {"sha256": entry.sha256},
            "size": entry.size,
            "core-metadata": {"sha256": entry.metadata_sha256},
            "dist-info-metadata": {"sha256": entry.metadata_sha256},
            **({"requires-python": entry.requires_python} if entry.requires_python else {}),
        }
        for entry in listed
    ]
    versions = sorted({entry.version for entry in listed})
    return _json({"name": PROJECT, "versions": versions, "files": files})


def sums(entries: Iterable[Entry], beside: dict[str, str]) -> str:
    """Hashes of every file that never changes, for `sha256sum --check`.

    Args:
        beside: paths of metadata and bills of materials with their hashes.
    """
    hashes = {**{entry.path: entry.sha256 for entry in entries}, **beside}
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(hashes.items()))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _overview(roots: Iterable[str]) -> str:
    links = [_link(f"{root}/", root) for root in sorted(roots)]
    links += [_link(name, name) for name in ("wheels.json", SUMS)]
    return _page(f"Wheels of {PROJECT}", links)


def _link(href: str, words: str, attributes: Any = None) -> str:
    extra = "".join(f' {key}="{html.escape(x)}"' for key, x in (attributes or {}).items())
    return f'<a href="{html.escape(href)}"{extra}>{html.escape(words)}</a><br>'


def _page(title: str, links: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="pypi:repository-version" content="{API}">'
    body = "\n".join(links)
    top = f"<!DOCTYPE html>\n<html><head>{head}<title>{title}</title></head>"
    return f"{top}<body>\n{body}\n</body></html>\n"


def _json(content: dict[str, Any]) -> str:
    return json.dumps({"meta": {"api-version": API}, **content}, indent=1) + "\n"
