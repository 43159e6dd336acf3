"""A run that is killed at any moment, also inside a save, resumes to the same bytes as an undisturbed run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from torture.kills import Killer, Moment
from torture.small_run import SmallRun, furnish

#: Enough steps for three checkpoints, an evaluation and a second epoch.
FEW_STEPS = ("train.steps=7", "train.epochs=null")


def killer(tmp_path: Path, bits: int, *settings: str) -> Killer:
    furnish(tmp_path)
    made = Killer(SmallRun(tmp_path, bits, settings), tmp_path / "runs", random.Random(bits))
    made.measure()
    return made


@pytest.mark.parametrize("bits", [32, 8])
def test_killed_runs_resume_to_the_same_bytes(bits: int, tmp_path: Path) -> None:
    small = killer(tmp_path, bits, *FEW_STEPS)
    operations = small.length.operations
    for part in (0.4, 0.6, 0.95):  # in the training, and while the adapter is written
        trial = small.trial([Moment("file operation", int(part * operations)), Moment("save", 2, 0.005)])
        assert trial.kills and not trial.faults


def test_a_wrong_resume_would_be_seen(tmp_path: Path) -> None:
    small = killer(tmp_path, 32, *FEW_STEPS)
    small.expected["adapter/adapter_model.safetensors"] = "the bytes of another adapter"
    assert "the bytes of another adapter" in small.trial([Moment("clock", seconds=0.0)]).faults[0]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_fifty_runs_that_are_killed_at_random(bits: int, tmp_path: Path) -> None:
    small = killer(tmp_path, bits)
    small.measure_started()
    faults = [fault for _ in range(50) for fault in small.trial().faults]
    assert not faults
