"""Folder that hostile files are unpacked into, beside files that nothing may open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuzzing.judge import Arena


@pytest.fixture(scope="session")
def arena() -> Iterator[Arena]:
    """Arena of the judge."""
    arena = Arena()
    yield arena
    arena.close()
