"""Fixtures of the tests of compiled code: built once a session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from native_tools import Stub, build_stub


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """The host library beside a driver that runs nothing."""
    return build_stub(tmp_path_factory.mktemp("stub"))
