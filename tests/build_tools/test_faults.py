"""What goes wrong while installing: each ends in one message and a status, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fresh_venv import (
    Environment,
    Installer,
    end,
    make_sdist,
    skip_unless_linux,
    unpacked,
)
from native_tools import needs
from stand_ins import UNIVERSAL, make_wheel, serving

from build_tools import download, manifest, mirror
from build_tools.__main__ import main
from build_tools.download import DownloadError

NAME = UNIVERSAL.rpartition("/")[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror of one wheel, of 3 MB; not to be written to."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("mirror")
    make_wheel(source, text="whole", filler=3_000_000)
    mirror.mirror(str(source), folder)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_unless_linux()
    return make_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def here(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "env")
    made.put_torch("2.8.0+cu128", "12.8")
    return made


@pytest.fixture
def pip(tmp_path: Path) -> Installer:
    return Installer("pip", tmp_path / "pip")


def test_a_mirror_that_is_down(sdist: Path, here: Environment, pip: Installer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        told = pip.fails(here, sdist, FLASH_ATTN_WHEEL_MIRROR=url)
    assert f"no mirror of wheels can be used: {url}" in told
    assert "Connection refused, also after 4 more tries" in told
    assert "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE installs the package without kernels" in told


def test_a_mirror_without_the_file(
    sdist: Path, here: Environment, pip: Installer, made: Path
) -> None:
    with serving(made) as (url, faults):
        faults.status[".whl"] = (404, 9)
        told = pip.fails(here, sdist, FLASH_ATTN_WHEEL_MIRROR=url)
    assert f"the wheel cannot be had: {url}/{UNIVERSAL}: HTTP status 404 Not Found" in told


def test_a_truncated_file(sdist: Path, here: Environment, pip: Installer, copy: Path) -> None:
    size = (copy / UNIVERSAL).stat().st_size
    os.truncate(copy / UNIVERSAL, 100_000)
    with serving(copy) as (url, _):
        told = pip.fails(here, sdist, FLASH_ATTN_WHEEL_MIRROR=url)
    assert f"it ends after 100000 of {size} bytes" in told


def test_a_file_with_another_hash(
    sdist: Path, here: Environment, pip: Installer, made: Path, copy: Path
) -> None:
    data = bytearray((copy / UNIVERSAL).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / UNIVERSAL).write_bytes(data)
    told = pip.fails(here, sdist, FLASH_ATTN_WHEEL_MIRROR=str(copy))
    assert "is expected; the file was changed or damaged, and nothing of it is kept" in told
    pip.install(here, sdist, FLASH_ATTN_WHEEL_MIRROR=str(made))
    anew = ("--force-reinstall", "--no-deps", "--no-cache-dir")
    status, _ = pip.run(here, sdist, *anew, FLASH_ATTN_WHEEL_MIRROR=str(copy))
    assert (status, here.installed) == (1, "text = 'whole'\n"), "what was there before stays"


def test_a_full_disk(sdist: Path, here: Environment, pip: Installer, made: Path) -> None:
    """A limit on the size of files, which a full disk looks like from here."""
    within = ("sh", "-c", 'ulimit -f 2000; exec "$@"', "sh")
    child = pip.start(here, sdist, within=within, FLASH_ATTN_WHEEL_MIRROR=str(made))
    told, _ = child.communicate(timeout=60)
    assert child.returncode != 0
    assert f"{NAME} cannot be written: File too large" in " ".join(told.split())
    assert "Traceback" not in told
    assert here.installed == ""


def test_a_full_disk_under_a_mirror(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "to" / UNIVERSAL
    target.parent.mkdir(parents=True)
    target.with_name(f".{NAME}.part").symlink_to("/dev/full")
    assert main(["mirror", "--from", str(made), "--to", str(tmp_path / "to")]) == 1
    assert f"{NAME} cannot be written: No space left on device" in capsys.readouterr().err
    assert list(target.parent.iterdir()) == []
    assert main(["mirror", "--from", str(made), "--to", str(tmp_path / "to")]) == 0
    assert main(["verify", str(tmp_path / "to")]) == 0


def test_an_installation_that_is_killed(
    sdist: Path, here: Environment, pip: Installer, made: Path
) -> None:
    with serving(made) as (url, faults):
        faults.stall = ".whl"
        child = pip.start(here, sdist, FLASH_ATTN_WHEEL_MIRROR=url)
        assert faults.stalled.wait(60)
        end(child)
        assert child.returncode == -9
        assert here.installed == ""
        faults.stall = ""
        assert pip.install(here, sdist, FLASH_ATTN_WHEEL_MIRROR=url) == "text = 'whole'\n"


def compiling(installer: Installer, here: Environment, what: Path, **settings: str) -> str:
    """What is said by a compilation that fails."""
    options = ("-v", "--no-deps")
    told = installer.fails(here, what, *options, FLASH_ATTN_CUDA_ARCHS="90", **settings)
    assert told.count("the CUDA kernels cannot be built: ") >= 1
    assert "hint: FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE installs the package without" in told
    return told


def with_a_torch_to_compile_for(here: Environment) -> None:
    """A torch that can be asked for its folders."""
    text = "class _C:\n    _GLIBCXX_USE_CXX11_ABI = True\n__version__ = '2.10.0'\n"
    (here.packages / "torch" / "__init__.py").write_text(text, "utf-8")
    ninja = here.python.with_name("ninja")
    ninja.write_text("#!/bin/sh\nexit 9\n", "utf-8")
    ninja.chmod(0o755)


def test_a_compiler_that_is_killed(
    sdist: Path, here: Environment, pip: Installer, tmp_path: Path
) -> None:
    with_a_torch_to_compile_for(here)
    compiler = tmp_path / "killed"
    compiler.write_text("#!/bin/sh\nkill -9 $$\n", "utf-8")
    compiler.chmod(0o755)
    told = compiling(pip, here, sdist, CXX=str(compiler))
    assert "compiling CUDA kernels for 90." in told
    assert f"cannot be built: {compiler} -std=c++17" in told


def test_no_compiler(sdist: Path, here: Environment, pip: Installer) -> None:
    with_a_torch_to_compile_for(here)
    for tool in ("g++", "clang++", "c++"):
        (pip.tools / tool).unlink()
    told = compiling(pip, here, sdist, PATH=str(pip.tools))
    assert "no C++ compiler: install g++ or clang, or set CXX" in told


def test_no_torch(sdist: Path, pip: Installer, made: Path, tmp_path: Path) -> None:
    bare = Environment(tmp_path / "bare")
    told = compiling(pip, bare, sdist)
    assert "cannot import torch, whose headers the shim needs" in told
    # A wheel for every torch needs none to choose by.
    installed = pip.install(bare, sdist, "--no-deps", FLASH_ATTN_WHEEL_MIRROR=str(made))
    assert installed == "text = 'whole'\n"


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("3.1.0", "for torch 2.4 and later 2.x"),
        ("2.3.1+cu121", "for torch 2.4 and later 2.x"),
        ("nightly", "says that its version is 'nightly'; install torch again"),
    ],
)
def test_an_unknown_torch(
    sdist: Path, here: Environment, pip: Installer, made: Path, version: str, message: str
) -> None:
    here.put_torch(version, "12.8")
    told = pip.fails(here, sdist, "--no-deps", FLASH_ATTN_WHEEL_MIRROR=str(made))
    assert message in told


PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_a_torch_for_cuda_11(sdist: Path, here: Environment, pip: Installer, made: Path) -> None:
    here.put_torch("2.7.1+cu118", "11.8")
    told = pip.fails(here, sdist, FLASH_ATTN_WHEEL_MIRROR=str(made))
    assert f"no wheel of flash-attn 2.8.3 for every torch serves Python {PYTHON}" in told
    assert f"{UNIVERSAL}: for CUDA 12 and 13; torch here is for 11.8" in told
    assert "FLASH_ATTN_BUILD=source compiles instead" in told


def test_an_unwritable_build_directory(
    sdist: Path, here: Environment, pip: Installer, tmp_path: Path
) -> None:
    """A file stands where the folder would: nobody can write below it, not even root."""
    with_a_torch_to_compile_for(here)
    tree = unpacked(sdist, tmp_path)
    (tree / "build").write_text("", "utf-8")
    told = compiling(pip, here, tree)
    assert "Not a directory" in told
    assert f"{tree}/build" in told


# Downloads by themselves


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses worth mentioning."""
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.01))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def fetch(made: Path, url: str, target: Path, tell: Callable[[str], None] = print) -> Path:
    entry = mirror.read_manifest(made)[UNIVERSAL]
    return download.fetch(
        download.join(f"{url}/", entry.path), target, entry.size, entry.sha256, tell
    )


@pytest.mark.usefixtures("soon")
def test_a_download_goes_on_where_it_was_cut_off_as_long_as_it_gets_further(
    made: Path, tmp_path: Path
) -> None:
    with serving(made) as (url, faults):
        faults.cut[".whl"] = (500_000, 5)
        told: list[str] = []
        fetch(made, url, tmp_path / "a.whl", told.append)
        ranges = [asked for _, asked, _ in faults.asked]
    assert ranges == ["", *(f"bytes={n * 500_000}-" for n in range(1, 6))]
    assert sum("trying again" in line for line in told) == 5
    assert (tmp_path / "a.whl").read_bytes() == (made / UNIVERSAL).read_bytes()


@pytest.mark.usefixtures("soon")
def test_what_is_left_of_another_file_is_not_gone_on_with(made: Path, tmp_path: Path) -> None:
    part = tmp_path / ".a.whl.part"
    size = (made / UNIVERSAL).stat().st_size
    with serving(made) as (url, _):
        for left, whole in ((size + 9, True), (size, False), (1000, False), (0, True)):
            part.write_bytes(b"x" * left)
            if whole:
                fetch(made, url, tmp_path / "a.whl")
                (tmp_path / "a.whl").unlink()
            else:
                with pytest.raises(DownloadError, match="changed or damaged"):
                    fetch(made, url, tmp_path / "a.whl")
            assert not part.exists()
        assert not (tmp_path / "a.whl").exists()


@pytest.mark.usefixtures("soon")
def test_progress_is_told(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PROGRESS_SECONDS", 0.0)
    told: list[str] = []
    with serving(made) as (url, _):
        fetch(made, url, tmp_path / "a.whl", told.append)
    assert told[0].startswith("a.whl: 0.3 of 3.0 MB")
    assert told[-1].startswith("a.whl: 3.0 of 3.0 MB")


@pytest.mark.usefixtures("soon")
def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/wheels.json"
        with pytest.raises(DownloadError, match="timed out, also after 2 more tries"):
            download.read(url)


@pytest.mark.usefixtures("soon")
def test_a_password_is_sent_and_not_told(made: Path) -> None:
    with serving(made) as (url, faults):
        named = url.replace("//", "//me:pass%20word@")
        assert manifest.parse(download.read(f"{named}/wheels.json"))
        assert faults.asked[0][2] == "Basic bWU6cGFzcyB3b3Jk"
        with pytest.raises(DownloadError) as error:
            download.read(f"{named}/none")
    assert f"{url}/none: HTTP status 404" in str(error.value)
    assert "pass" not in str(error.value)


class Answer(BaseHTTPRequestHandler):
    """Says what it was asked; one address leads elsewhere."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path.endswith("/away") else 200)
        self.send_header("Location", "http://example.org/wheels.json")
        self.send_header("Content-Length", str(len(self.path)))
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def answering() -> ThreadingHTTPServer:
    return ThreadingHTTPServer(("127.0.0.1", 0), Answer)


def start(server: ThreadingHTTPServer, request: pytest.FixtureRequest) -> int:
    """Its port."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    request.addfinalizer(lambda: (server.shutdown(), thread.join(), server.server_close()))
    return int(server.server_address[1])


@pytest.mark.usefixtures("soon")
def test_a_proxy_is_used(
    answering: ThreadingHTTPServer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{start(answering, request)}")
    url = "http://127.0.0.1:9/wheels.json"
    assert download.read(url).decode() == url
    # A redirect to plain HTTP on another machine is followed no more than such an address.
    with pytest.raises(DownloadError, match="plain HTTP can be changed"):
        download.read("http://127.0.0.1:9/away")


@pytest.mark.usefixtures("soon")
def test_certificates_are_those_that_the_environment_names(
    answering: ThreadingHTTPServer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [needs("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    answering.socket = context.wrap_socket(answering.socket, server_side=True)
    url = f"https://localhost:{start(answering, request)}/wheels.json"
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DownloadError, match="PIP_CERT names a file of certificates"):
        download.read(url)
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(certificate))
            assert download.read(url) == b"/wheels.json"
            patch.setenv(name, str(tmp_path / "none"))
            with pytest.raises(DownloadError, match="none, set by PIP_CERT or"):
                download.read(url)
