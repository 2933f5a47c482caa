"""pip and uv install this source archive: what they take, and what their caches then hold.

The wheels are stand-ins and so is torch; the sources are real.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from fresh_venv import Environment, Installer, make_sdist, skip_unless_linux, unpacked, wheel_of
from stand_ins import UNIVERSAL, make_mirror, serving

MANY = "flash-attn/flash_attn-2.8.3-py3-none-manylinux_2_28_x86_64.whl"
FOR_28, FOR_29 = f"whl/cu12/torch2.8/{MANY}", f"whl/cu13/torch2.9/{MANY}"
AGAIN = {"pip": "--force-reinstall", "uv": "--reinstall-package=flash-attn"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with the wheel for every torch, and two for one each."""
    wheels = {UNIVERSAL: "", FOR_28: "2.8", FOR_29: "2.9"}
    return make_mirror(tmp_path_factory.mktemp("mirror"), wheels)


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror whose wheels are for one torch each."""
    return make_mirror(tmp_path_factory.mktemp("bound"), {FOR_28: "2.8", FOR_29: "2.9"})


class Ground(NamedTuple):
    """A source archive, and wheels for builds that are isolated and may fetch nothing."""

    sdist: Path
    links: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    skip_unless_linux()
    folder = tmp_path_factory.mktemp("ground")
    return Ground(make_sdist(folder), wheel_of("setuptools", folder / "links").parent)


class Place(NamedTuple):
    """An environment and what installs into it."""

    environment: Environment
    installer: Installer


@pytest.fixture(
    params=[("pip", False), ("pip", True), ("uv", False), ("uv", True)],
    ids=["pip", "pip-isolated", "uv", "uv-isolated"],
)
def place(request: pytest.FixtureRequest, ground: Ground, tmp_path: Path) -> Place:
    name, is_isolated = request.param
    links = ground.links if is_isolated else None
    made = Environment(tmp_path / "env", has_tools=not is_isolated)
    return Place(made, Installer(name, tmp_path / "installer", links))


def test_caches_cannot_be_poisoned_by_another_torch(
    ground: Ground, place: Place, made: Path
) -> None:
    here, installer = place
    once_more = (AGAIN[installer.name], "--no-deps")
    with serving(made) as (url, faults):
        here.put_torch("2.8.0+cu128", "12.8")
        first = installer.install(here, ground.sdist, FLASH_ATTN_WHEEL_MIRROR=url)
        taken = [path for path, *_ in faults.asked if path.endswith(".whl")]
        here.put_torch("2.9.1+cu130", "13.0")
        second = installer.install(here, ground.sdist, *once_more, FLASH_ATTN_WHEEL_MIRROR=url)
    # Whether the second comes out of the cache or not, it is the wheel for every torch.
    assert taken == [f"/{UNIVERSAL}"]
    assert first == second == f"text = {UNIVERSAL!r}\n"


def test_a_wheel_for_one_torch_is_not_put_into_caches_but_has_an_address(
    ground: Ground, place: Place, bound: Path
) -> None:
    here, installer = place
    for version, path in (("2.8.0", FOR_28), ("2.9.1", FOR_29)):
        here.put_torch(version, "12.8" if path == FOR_28 else "13.0")
        options = ("--no-deps", AGAIN[installer.name])
        settings = {"FLASH_ATTN_WHEEL_MIRROR": str(bound)}
        status, told = installer.run(here, ground.sdist, *options, **settings)
        assert status != 0
        assert f"one for torch {version[:3]} alone does" in told
        command = re.search(r"pip install\s+'(flash-attn @ [^']+)'", " ".join(told.split()))
        assert command is not None, told
        told = installer.install(here, Path(command[1]), *options)
        assert told == f"text = {path!r}\n"


def test_the_torch_of_the_environment_decides(ground: Ground, place: Place, made: Path) -> None:
    here, installer = place
    here.put_torch("2.5.1+cu118", "11.8")
    told = installer.fails(here, ground.sdist, FLASH_ATTN_WHEEL_MIRROR=str(made))
    assert "torch here is for 11.8" in told
    assert f"torch 2.5.1+cu118 for CUDA 11.8 in {here.packages}" in told


@pytest.mark.parametrize("way", ["environment", "setting"])
def test_the_package_without_kernels_is_had_on_request(
    ground: Ground, place: Place, tmp_path: Path, way: str
) -> None:
    here, installer = place
    here.put_torch("2.8.0", "12.8")
    # Neither a mirror nor a compiler is there, so asking for either would fail.
    settings = {"FLASH_ATTN_WHEEL_MIRROR": str(tmp_path / "none"), "FLASH_ATTN_CUDA_ARCHS": "90"}
    options = ["-C", "no-cuda-extensions=true"] if way == "setting" else []
    if way == "environment":
        settings["FLASH_ATTENTION_SKIP_CUDA_BUILD"] = "TRUE"
    assert "flash_attn_func" in installer.install(here, ground.sdist, *options, **settings)
    assert not list((here.packages / "flash_attn").glob("*.so"))
    assert (here.packages / "flash_attn_2_cuda.py").exists()


@pytest.mark.parametrize("name", ["pip", "uv"])
def test_a_local_version_goes_into_the_metadata_of_a_folder(
    ground: Ground, tmp_path: Path, name: str
) -> None:
    tree = unpacked(ground.sdist, tmp_path)
    here = Environment(tmp_path / "env")
    here.put_torch("2.8.0", None)
    Installer(name, tmp_path / "i").install(here, tree, FLASH_ATTN_LOCAL_VERSION="site.1")
    assert [path.name for path in here.packages.glob("flash_attn-*")] == [
        "flash_attn-2.8.3+site.1.dist-info"
    ]
    told = Installer(name, tmp_path / "i").fails(
        Environment(tmp_path / "other"), tree, "--no-deps", FLASH_ATTN_LOCAL_VERSION="a b"
    )
    assert "must be letters and digits, with dots between" in told
