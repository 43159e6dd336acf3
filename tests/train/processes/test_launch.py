"""A process that a launcher has started as one of several never trains alone."""

from __future__ import annotations

import pytest
import torch

from helpers.processes import in_processes
from lorakeet.errors import TrainingError
from lorakeet.train.processes.launch import check_launch, declared_processes, join_processes, restarts

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
LAUNCHERS = [*WHOLE, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_a_whole_launch_is_accepted() -> None:
    for environment in ({}, WHOLE, {**WHOLE, "SLURM_NTASKS": "16"}, {"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "1"}):
        check_launch(environment)
    assert declared_processes({**WHOLE, "SLURM_NTASKS": "16"}) == (2, "WORLD_SIZE")


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"])
def test_a_variable_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(TrainingError, match=f"without {missing}: this process would train alone"):
        check_launch({name: value for name, value in WHOLE.items() if name != missing})


@pytest.mark.parametrize(
    ("name", "value"), [("SLURM_NTASKS", "2"), ("SLURM_STEP_NUM_TASKS", "2"), ("WORLD_SIZE", "two")]
)
def test_a_task_of_another_launcher_does_not_train_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=name):
        join_processes(torch.device("cpu"))


def join() -> tuple[int, int]:
    state = join_processes(torch.device("cpu"))
    state.wait_for_everyone()  # the first process holds the store by which they meet
    return state.process_index, state.num_processes


@pytest.mark.slow
def test_processes_find_each_other() -> None:
    assert [outcome.result for outcome in in_processes(join)] == [(0, 2), (1, 2)]


def test_restarts_of_torchrun_are_counted() -> None:
    assert (restarts({}), restarts({"TORCHELASTIC_RESTART_COUNT": "2"})) == (0, 2)
