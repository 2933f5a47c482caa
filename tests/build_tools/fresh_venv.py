"""Environments to install into: a Python without packages, and a torch that is a name alone."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any, Optional

import pytest
from native_tools import ROOT, needs
from test_house import project_files

from build_tools.paths import env

# What an installation asks the machine, and this one shall not answer.
HIDDEN = ("PIP_", "UV_", "CONDA_", "VIRTUAL_ENV", "PYTHONPATH")
NAMES = {name for v in env.BUILD_VARIABLES for name in (v.name, *v.aliases)}
PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}


def make_sdist(folder: Path) -> Path:
    """The source archive of a copy of the tree."""
    source, out = folder / "source", folder / "sdist"
    for path in project_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    out.mkdir()
    program = "import sys; from build_tools import backend; backend.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, str(out)], cwd=source, capture_output=True, check=True
    )
    return next(out.iterdir())


def unpacked(sdist: Path, folder: Path) -> Path:
    """The folder of sources in an archive."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    return folder / "flash_attn-2.8.3"


def wheel_of(name: str, folder: Path) -> Path:
    """An installed distribution as a wheel again, for builds that may fetch nothing."""
    found = importlib.metadata.distribution(name)
    target = folder / f"{name}-{found.version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    left_out = {"INSTALLER", "REQUESTED", "direct_url.json"}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in found.files or []:
            if ".." not in file.parts and file.suffix != ".pyc" and file.name not in left_out:
                archive.write(str(file.locate()), str(file))
    return target


class Environment:
    """A fresh virtual environment.

    Args:
        has_tools: whether setuptools is there, for builds without isolation.
    """

    def __init__(self, folder: Path, has_tools: bool = True) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.python = folder / "bin" / "python"
        self.packages = next((folder / "lib").glob("python3*/site-packages"))
        self._add("einops", "0.8.1")
        if has_tools:
            tools = importlib.metadata.distribution("setuptools")
            for name in {file.parts[0] for file in tools.files or []} - {".."}:
                (self.packages / name).symlink_to(str(tools.locate_file(name)))

    def _add(self, name: str, version: str) -> Path:
        """A distribution without content, which installers count as installed."""
        for old in self.packages.glob(f"{name}*"):
            shutil.rmtree(old)
        package, info = self.packages / name, self.packages / f"{name}-{version}.dist-info"
        files = {
            package / "__init__.py": "",
            info / "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            info / "INSTALLER": "pip\n",
        }
        for file, text in files.items():
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, "utf-8")
        names = [file.relative_to(self.packages).as_posix() for file in files]
        (info / "RECORD").write_text("".join(f"{x},,\n" for x in names), "utf-8")
        return package

    def put_torch(self, version: str, cuda: Optional[str]) -> None:
        """The torch of this environment from now on; it cannot be imported, only read."""
        package = self._add("torch", version)
        text = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
        (package / "version.py").write_text(text, "utf-8")
        (package / "__init__.py").write_text("raise ImportError('torch was imported')", "utf-8")

    @property
    def installed(self) -> str:
        """What the installed stand-in says of itself; empty if nothing of it is there."""
        if not list(self.packages.glob("flash_attn*")):
            return ""
        return (self.packages / "flash_attn" / "__init__.py").read_text("utf-8")


class Installer:
    """pip or uv with a cache of its own, on a machine without GPU and compilers.

    Args:
        links: a folder of wheels for isolated builds; None builds without isolation.
    """

    def __init__(self, name: str, folder: Path, links: Optional[Path] = None) -> None:
        self.name, self.folder, self.links = name, folder, links
        tools = folder / "tools"
        tools.mkdir(parents=True, exist_ok=True)
        for tool in ("nvidia-smi", "g++", "clang++", "c++"):
            (tools / tool).write_text("#!/bin/sh\nexit 9\n", "utf-8")
            (tools / tool).chmod(0o755)
        self.tools = tools

    def command(self, env: Environment, what: str, *options: str) -> list[str]:
        cache = str(self.folder / f"cache-{self.name}")
        isolation = (
            ("--no-build-isolation",) if self.links is None else ("--find-links", str(self.links))
        )
        common = ("--no-index", *isolation, "--cache-dir", cache, *options, what)
        if self.name == "pip":
            program = (sys.executable, "-m", "pip", "--python", str(env.python), "install")
            return [*program, "--disable-pip-version-check", *common]
        beside = Path(sys.executable).with_name("uv")
        program = (str(beside) if beside.exists() else needs("uv"), "pip", "install")
        return [*program, "--no-config", "--python", str(env.python), *common]

    def surroundings(self, env: Environment, settings: dict[str, str]) -> dict[str, str]:
        kept = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(HIDDEN) and name not in NAMES and name.upper() not in PROXIES
        }
        # The environment is an activated one.
        path = (str(self.tools), str(env.python.parent), kept.get("PATH", ""))
        here = {"PATH": os.pathsep.join(path), "PIP_CONFIG_FILE": os.devnull}
        return {**kept, **here, "XDG_CONFIG_HOME": str(self.folder), **settings}

    def start(
        self,
        env: Environment,
        what: Path,
        *options: str,
        within: tuple[str, ...] = (),
        **settings: str,
    ) -> subprocess.Popen[str]:
        """In a session of its own: no terminal, and one process group.

        Args:
            within: a command that runs the one after it.
        """
        return subprocess.Popen(
            [*within, *self.command(env, str(what), *options)],
            env=self.surroundings(env, settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=self.folder,
        )

    def run(self, env: Environment, what: Path, *options: str, **settings: str) -> tuple[int, str]:
        """(exit status, what was said)."""
        child = self.start(env, what, *options, **settings)
        try:
            said, _ = child.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            end(child)
            raise
        return child.returncode, said

    def install(self, env: Environment, what: Path, *options: str, **settings: str) -> str:
        """Installs; returns what the stand-in says of itself."""
        status, said = self.run(env, what, *options, **settings)
        assert status == 0, said
        return env.installed

    def fails(self, env: Environment, what: Path, *options: str, **settings: str) -> str:
        """What is said by an installation that fails, says why once, and leaves nothing."""
        status, said = self.run(env, what, *options, **settings)
        assert status != 0, said
        assert said.count("error: ") >= 1, said
        assert "Traceback" not in said
        assert env.installed == ""
        return " ".join(said.split())


def end(child: subprocess.Popen[Any]) -> None:
    """Ends a process and all that it started."""
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def skip_unless_linux() -> None:
    """The stand-ins are wheels for one platform."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        pytest.skip("the stand-ins are for Linux on x86_64")
