"""What pip and uv take from a mirror: from files, over HTTP, by hash, behind pypiserver."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fresh_venv import skip_unless_linux
from native_tools import needs
from stand_ins import UNIVERSAL, make_mirror, serving

from build_tools import index_pages, manifest

PLAIN = "whl/cu12/torch2.8/flash-attn/flash_attn-2.8.3-py3-none-manylinux_2_28_x86_64.whl"
# Both installers are told to look nowhere else.
INSTALL = ("--no-deps", "--target")


def installer(name: str) -> list[str]:
    """The start of an install command of pip or uv."""
    if name == "pip":
        quiet = ("--isolated", "install", "--disable-pip-version-check", "--no-cache-dir")
        return [sys.executable, "-m", "pip", *quiet]
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else needs("uv")
    return [program, "pip", "install", "--no-config", "--no-cache", "--python", sys.executable]


def install(name: str, target: Path, *words: str) -> str:
    """Installs into a folder; returns what the stand-in says of itself."""
    alone = {key: text for key, text in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    command = [*installer(name), *INSTALL, str(target), *words]
    child = subprocess.run(
        command,
        env={**alone, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return (target / "flash_attn" / "__init__.py").read_text("utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror; not to be written to."""
    skip_unless_linux()
    return make_mirror(tmp_path_factory.mktemp("mirror"), {UNIVERSAL: "", PLAIN: "2.8"})


@pytest.fixture(scope="module", params=["file", "http"])
def base(request: pytest.FixtureRequest, made: Path) -> Iterator[str]:
    """The address of the mirror."""
    if request.param == "file":
        yield made.as_uri()
    else:
        with serving(made) as (url, _):
            yield url


@pytest.mark.parametrize("name", ["pip", "uv"])
def test_installers_take_wheels_from_an_index(name: str, base: str, tmp_path: Path) -> None:
    for path in (UNIVERSAL, PLAIN):
        root = path.rpartition("/flash-attn/")[0]
        target = tmp_path / root.replace("/", "-")
        told = install(name, target, "--index-url", f"{base}/{root}", "flash-attn==2.8.3")
        assert told == f"text = {path!r}\n"


@pytest.mark.parametrize("name", ["pip", "uv"])
def test_installers_take_wheels_by_hash_from_a_find_links_page(
    name: str, base: str, made: Path, tmp_path: Path
) -> None:
    digest = manifest.sha256(made / PLAIN)
    page = f"{base}/whl/cu12/torch2.8/find-links.html"
    if base.startswith("file:") and name == "uv":
        page = str(made / Path(PLAIN).parent)  # uv reads pages over HTTP, and folders
    file = tmp_path / "requirements.txt"
    for good, text in ((True, digest), (False, "0" * 64)):
        file.write_text(f"flash-attn==2.8.3 --hash=sha256:{text}\n", "utf-8")
        words = ("--no-index", "--find-links", page, "--require-hashes", "-r", str(file))
        if good:
            assert install(name, tmp_path / "good", *words) == f"text = {PLAIN!r}\n"
        else:
            with pytest.raises(AssertionError, match=r"(?i)hash"):
                install(name, tmp_path / "bad", *words)
            assert not (tmp_path / "bad" / "flash_attn").exists()


def test_installers_read_json_and_metadata_before_the_wheel(made: Path, tmp_path: Path) -> None:
    with serving(made) as (url, faults):
        install("pip", tmp_path, "--index-url", f"{url}/whl", "flash-attn")
        asked = [path.rpartition("/")[2] for path, _, _ in faults.asked]
        wheel = UNIVERSAL.rpartition("/")[2]
        assert asked == ["", f"{wheel}.metadata", wheel]
        request = urllib.request.Request(
            f"{url}/whl/flash-attn/", headers={"Accept": index_pages.JSON_TYPE}
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.headers["Content-Type"] == index_pages.JSON_TYPE
            assert json.load(answer)["name"] == "flash-attn"


@pytest.mark.parametrize("name", ["pip", "uv"])
def test_a_root_serves_behind_pypiserver(name: str, made: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pypiserver") is None:
        pytest.skip("pypiserver is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = (made / PLAIN).parent
    command = ["pypiserver", "run", "-p", str(port), "-i", "127.0.0.1", "--disable-fallback"]
    server = subprocess.Popen(
        [sys.executable, "-m", *command, str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, server)
        url = f"http://127.0.0.1:{port}/simple/"
        told = install(name, tmp_path, "--index-url", url, "flash-attn==2.8.3")
        assert told == f"text = {PLAIN!r}\n"
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert server.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not answer")
