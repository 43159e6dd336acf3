"""A run that is killed at any moment, also inside a save, resumes to the same bytes as an undisturbed run."""

from __future__ import annotations

import pytest

from torture.kills import Moment


@pytest.mark.parametrize("bits", [32, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_runs_resume_to_the_same_bytes(bits: int, few_steps) -> None:
    killer = few_steps(bits)
    operations = killer.length.operations
    for part in (0.4, 0.95):  # in the training, and while the adapter is written
        trial = killer.trial([Moment("file operation", int(part * operations)), Moment("save", 2, 0.005)])
        assert trial.kills and not trial.faults


def test_a_wrong_resume_would_be_seen(few_steps) -> None:
    killer = few_steps(32)
    right, killer.expected = killer.expected, {**killer.expected, "adapter/adapter_model.safetensors": "other bytes"}
    trial = killer.trial([Moment("clock")])
    killer.expected = right
    assert "other bytes" in trial.faults[0]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_fifty_runs_that_are_killed_at_random(bits: int, whole_run) -> None:
    killer = whole_run(bits)
    killer.measure_started()
    assert not [fault for _ in range(50) for fault in killer.trial().faults]
