"""A fault of one process, NaN or a full disk: all stop with the same sentence, and none waits for another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from helpers.disk import files_of_at_most
from helpers.processes import in_processes, settings
from lorakeet.config import read_run
from lorakeet.train import run
from lorakeet.train.trainer import Trainer

pytestmark = pytest.mark.slow


def poison(step: int) -> None:
    """Make the loss of process 1 not finite in one step."""
    honest = Trainer.compute_loss

    def loss(self: Any, model: Any, *args: Any, **settings: Any) -> Any:
        found = honest(self, model, *args, **settings)
        planted = os.environ["RANK"] == "1" and model.training and self.state.global_step == step
        return found * float("nan") if planted else found

    Trainer.compute_loss = loss  # type: ignore[method-assign]


def fill_disk(step: int) -> None:
    """Let process 1 write nothing after a step."""
    honest = Trainer._save_checkpoint

    def save(self: Any, *args: Any, **settings: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.global_step > step:
            with files_of_at_most(10):
                return honest(self, *args, **settings)
        return honest(self, *args, **settings)

    Trainer._save_checkpoint = save  # type: ignore[method-assign]


def train_with(plant: Any, file: Path, step: int) -> Any:
    plant(step)
    return run.run_training(read_run(file))


@pytest.mark.parametrize(
    ("plant", "told"),
    [(poison, "the loss of step 4 is not finite; the step was not applied"), (fill_disk, "File too large")],
)
def test_a_fault_of_one_process_stops_all(tmp_path: Path, plant: Any, told: str) -> None:
    file = settings(tmp_path, "run", save_every=2, eval_every=None)
    for outcome in in_processes(train_with, plant, file, 3, seconds=200):
        assert outcome.error is not None and told in outcome.error and outcome.exit_code == 0, outcome
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()
