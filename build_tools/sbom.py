"""The bill of materials in a wheel: CycloneDX 1.6, under dist-info/sboms as PEP 770 has it.

It lists what is compiled, by the parts that it was made in, with what it was made with; and what a
wheel needs but does not contain. RECORD has the hashes of everything else.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.parser import HeaderParser
from typing import Any

from build_tools.paths import env
from build_tools.wheel_name import PROJECT
from build_tools.zip_file import Entries, date_time

FILE = "flash_attn.cdx.json"
LICENSE = "BSD-3-Clause"
_PROPERTY = f"{PROJECT}:"


@dataclass(frozen=True)
class Piece:
    """A part as a wheel has it.

    Args:
        name: of the part.
        made_with: what it was made for and with.
        files: their paths in the wheel.
    """

    name: str
    made_with: Mapping[str, str]
    files: tuple[str, ...]


def text(metadata: str, pieces: Iterable[Piece], entries: Entries) -> str:
    """The bill of a wheel with this METADATA and these parts."""
    head = HeaderParser().parsestr(metadata)
    version, pieces = str(head["Version"]), list(pieces)
    needed = [x for x in head.get_all("Requires-Dist", []) if "extra ==" not in x]
    outside = [_outside(requirement) for requirement in needed]
    bill: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            **_time(),
            "lifecycles": [{"phase": "build"}],
            "component": {
                "type": "library",
                "bom-ref": PROJECT,
                "name": PROJECT,
                "version": version,
                "purl": f"pkg:pypi/{PROJECT}@{version.replace('+', '%2B')}",
                "licenses": _licenses(),
            },
        },
        "components": [*(_component(piece, version, entries) for piece in pieces), *outside],
        "dependencies": [
            {
                "ref": PROJECT,
                "dependsOn": [*(x.name for x in pieces), *(x["bom-ref"] for x in outside)],
            }
        ],
    }
    # Decided by the contents: the same wheel has the same one.
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(bill))
    return json.dumps({"serialNumber": f"urn:uuid:{serial}", **bill}, indent=1) + "\n"


def pieces_of(bill: str) -> list[Piece]:
    """What `text` was given; ValueError for anything that it did not write."""
    try:
        components = json.loads(bill)["components"]
        return [
            Piece(
                component["name"],
                {x["name"].removeprefix(_PROPERTY): x["value"] for x in component["properties"]},
                tuple(file["name"] for file in component["components"]),
            )
            for component in components
            if "components" in component
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{FILE} is not of this project's making: {error!r}") from None


def hashes_of(bill: str) -> dict[str, str]:
    """SHA-256 of every file that a bill lists."""
    parts = json.loads(bill)["components"]
    files = [file for part in parts for file in part.get("components", ())]
    return {file["name"]: file["hashes"][0]["content"] for file in files}


def _time() -> dict[str, str]:
    """The time, if a build was told one: anything else would differ from build to build."""
    if env.SOURCE_DATE_EPOCH.text() is None:
        return {}
    return {"timestamp": datetime(*date_time(), tzinfo=timezone.utc).isoformat()}


def _licenses() -> list[dict[str, Any]]:
    return [{"license": {"id": LICENSE}}]


def _component(piece: Piece, version: str, entries: Entries) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": piece.name,
        "name": piece.name,
        "version": version,
        "licenses": _licenses(),
        "properties": [
            {"name": _PROPERTY + name, "value": value} for name, value in piece.made_with.items()
        ],
        "components": [
            {
                "type": "file",
                "name": file,
                "hashes": [{"alg": "SHA-256", "content": entries[file].sha256}],
            }
            for file in piece.files
        ],
    }


def _outside(requirement: str) -> dict[str, Any]:
    """A package that an installer brings: needed, and no part of the wheel."""
    end = next((i for i, c in enumerate(requirement) if c in " <>=!~;["), len(requirement))
    name = requirement[:end]
    return {
        "type": "library",
        "bom-ref": name,
        "name": name,
        "scope": "required",
        "description": f"not contained: an installer brings {requirement}",
        "purl": f"pkg:pypi/{name}",
    }
