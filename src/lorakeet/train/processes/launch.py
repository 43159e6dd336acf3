"""The launch of a run: how many processes a launcher has started, and whether they have found each other.

A launcher tells each process its place by environment variables. Where they are incomplete, libraries train without a
word in one process, and every process writes its own adapter over those of the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import PartialState

from lorakeet.errors import TrainingError

#: Variables of the number of processes: of torch, which has the last word, of MPI (three kinds), and of Slurm.
_NUMBERS = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
)
#: Variables that torch needs beside ``WORLD_SIZE``.
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HINT = "start with torchrun or accelerate launch, as docs/scale.md shows; for one process of several tasks: srun --ntasks 1"


def declared_processes(environment: Mapping[str, str] = os.environ) -> tuple[int, str]:
    """Return how many processes the launcher says it has started, and the variable that says so.

    Raises:
        TrainingError: The variable is no number.
    """
    name = next((name for name in _NUMBERS if environment.get(name)), None)
    if name is None:
        return 1, ""
    try:
        return int(environment[name]), name
    except ValueError:
        raise TrainingError(f"{name}={environment[name]!r} is no number of processes", _HINT) from None


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Check the variables of the launcher before the processes look for each other.

    Raises:
        TrainingError: Some are missing.
    """
    number, name = declared_processes(environment)
    missing = [each for each in _NEEDED if not environment.get(each)]
    if number > 1 and name == "WORLD_SIZE" and missing:
        raise TrainingError(f"WORLD_SIZE={number} without {', '.join(missing)}: this process would train alone", _HINT)
    if int(environment.get("RANK") or 0) > 0 and name != "WORLD_SIZE":
        raise TrainingError(f"RANK={environment['RANK']} without WORLD_SIZE: this process would train alone", _HINT)


def join_processes(device: torch.device) -> PartialState:
    """Join the other processes of the launch; return at once where there are none.

    Args:
        device: Device of the training: accelerate joins no others on a CPU by itself.

    Raises:
        TrainingError: They do not find each other, or not all of those that the launcher has started.
    """
    check_launch()
    number, name = declared_processes()
    try:
        state = PartialState(cpu=device.type == "cpu")
    except Exception as error:
        if number == 1:
            raise
        raise TrainingError(f"the {number} processes of {name} do not find each other: {error}", _HINT) from error
    if state.num_processes != number:
        raise TrainingError(
            f"{name}={number}, but this process found {state.num_processes - 1} others: it would train alone", _HINT
        )
    return state


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often the launcher has restarted the processes of this node."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0)
