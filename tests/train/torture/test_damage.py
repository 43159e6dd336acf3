"""A damaged file of an interrupted run: the checkpoint before is taken and named, or the run is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from torture.damage import Damager


@pytest.fixture
def damager(few_steps, tmp_path: Path) -> Damager:
    killer = few_steps(32)
    return Damager(killer.run, tmp_path, random.Random(0), killer.expected, last=4)


@pytest.mark.parametrize(("name", "kind"), [("adapter_model.safetensors", "flip"), ("trainer_state.json", "truncate")])
def test_the_checkpoint_before_is_taken_and_named(name: str, kind: str, damager: Damager) -> None:
    trial = damager.trial(f"checkpoints/checkpoint-4/{name}", kind)
    assert trial.outcome == "an earlier checkpoint" and not trial.faults


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_a_hundred_damaged_files(bits: int, whole_run) -> None:
    killer = whole_run(bits)
    damager = Damager(killer.run, killer.folder, killer.chance, killer.expected)
    assert not [(trial, fault) for _ in range(100) for trial in [damager.trial()] for fault in trial.faults]
