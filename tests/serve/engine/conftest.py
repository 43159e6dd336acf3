"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from helpers.model_fixtures import base, folder, save_model  # noqa: F401
from helpers.served import Served, make_served


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Return a tiny base with eight adapters."""
    return make_served(tmp_path_factory.mktemp("served"))
