"""Undisturbed runs of a few steps, with which the disturbed ones are compared."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from torture.kills import Killer
from torture.small_run import SmallRun, furnish

#: Enough steps for three checkpoints, an evaluation and a second epoch.
FEW_STEPS = ("train.steps=7", "train.epochs=null")


@pytest.fixture(scope="session")
def few_steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Killer]:
    """Return the function that gives the short run of a base of this number of bits, measured once."""
    folder, made = tmp_path_factory.mktemp("torture"), dict[int, Killer]()

    def give(bits: int) -> Killer:
        if not made:
            furnish(folder)
        if bits not in made:
            made[bits] = Killer(SmallRun(folder, bits, FEW_STEPS), folder / str(bits), random.Random(bits))
            made[bits].measure()
        return made[bits]

    return give


@pytest.fixture
def whole_run(tmp_path: Path) -> Callable[[int], Killer]:
    """Return the function that gives the whole small run of a base of this number of bits."""

    def give(bits: int) -> Killer:
        furnish(tmp_path)
        killer = Killer(SmallRun(tmp_path, bits), tmp_path / "runs", random.Random(bits))
        killer.measure()
        return killer

    return give
