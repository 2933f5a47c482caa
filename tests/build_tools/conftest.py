"""Fixtures of the tests of compiled code: built once a session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import emulated
import shim_runs
from native_tools import Stub, build_stub


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """The host library beside a driver that runs nothing."""
    return build_stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """The package as it stands after a build, beside a driver that runs nothing."""
    return shim_runs.build_installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """The package on a driver that runs Hopper's kernels."""
    return emulated.build_machine(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def factory_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where parts stay from one module of tests to the next."""
    return tmp_path_factory.mktemp("factory")


@pytest.fixture(scope="module")
def factory(factory_folder: Path) -> Iterator[object]:
    """A wheel factory with few kernels, `small_wheels.Factory`."""
    from small_wheels import running  # asks which torch is here: a second that other tests save

    with running(factory_folder) as made:
        yield made
