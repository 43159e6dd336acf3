"""The launch of a run: how many processes a launcher has started, and whether they have found each other.

A launcher tells each process its place by environment variables. Where they are incomplete, libraries train without a
word in one process, and every process writes its own adapter over those of the others.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed

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
#: Type of device -> torch's backend of its collective operations.
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
#: Seconds between two looks for processes that have not come yet.
POLL = 0.02
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
        if number > 1 and name == "WORLD_SIZE" and device.type in _BACKENDS and not distributed.is_initialized():
            store, rank, processes = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]
            fresh = distributed.PrefixStore(fresh_prefix(store, rank, processes), store)  # type: ignore[attr-defined]
            distributed.init_process_group(_BACKENDS[device.type], store=fresh, rank=rank, world_size=processes)
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


def fresh_prefix(store: Any, rank: int, processes: int) -> str:
    """Return a prefix that all processes of this start share, and that no earlier start has used.

    Under ``torchrun --max-restarts`` the store outlives a restart, with the addresses of the processes that have ended.
    The faster of two processes then reads the old address of the other, and joining fails about every second time (seen in
    torch 2.13). So each process says hello by a random name until the first one answers that name.

    Args:
        store: Store of the launcher.
        rank: Number of this process.
        processes: Number of all processes.

    Raises:
        TimeoutError, DistStoreError: A process has not come in time.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        _answer_all(store, own, processes)
        return own
    store.set(f"lorakeet/hello/{rank}", own)
    prefix: str = store.get(f"lorakeet/answer/{own}").decode()
    store.set(f"{prefix}/here/{rank}", "")
    store.wait([f"{prefix}/all"])
    return prefix


def _answer_all(store: Any, prefix: str, processes: int) -> None:
    """Answer every hello, those of an earlier start too, until every process has read its answer."""
    missing, answered = set(range(1, processes)), dict[int, str]()
    deadline = time.monotonic() + store.timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([hello := f"lorakeet/hello/{rank}"]) and answered.get(rank) != (
                name := store.get(hello).decode()
            ):
                store.set(f"lorakeet/answer/{name}", prefix)
                answered[rank] = name
        missing = {rank for rank in missing if not store.check([f"{prefix}/here/{rank}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(missing)} have not started")
        time.sleep(POLL)
    store.set(f"{prefix}/all", "")


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often the launcher has restarted the processes of this node."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0)
