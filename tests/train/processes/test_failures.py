"""An error of one process ends all processes, each with the message of the one that failed."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from helpers.processes import Outcome, in_processes
from lorakeet.errors import DataError
from lorakeet.train.processes import failures
from lorakeet.train.processes.failures import shared_failures
from lorakeet.train.processes.launch import join_processes


def wait_for_each_other() -> None:
    torch.distributed.barrier()


def fail(kind: str) -> None:
    """Fail in process 1 as told, while process 0 waits for it."""
    state = join_processes(torch.device("cpu"))
    with shared_failures():
        wait_for_each_other()
        if state.process_index == 1:
            if kind == "data":
                raise DataError("row 7 of x.jsonl has no text", "remove it")
            if kind == "memory":
                raise MemoryError("cannot allocate 9 GB")
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "hangs":  # an error, and then a long way to the end of the process
                try:
                    with shared_failures():
                        raise DataError("row 7 of x.jsonl has no text")
                finally:
                    time.sleep(30)
        wait_for_each_other()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("data", "ProcessError: process 1 of 2 failed: row 7 of x.jsonl has no text\nhint: remove it"),
        pytest.param(
            "memory",
            "ProcessError: process 1 of 2 failed: MemoryError: cannot allocate 9 GB",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "killed",
            "ProcessError: another of the 2 processes ended without a message, perhaps killed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_of_one_process_ends_all(kind: str, told: str) -> None:
    first, second = in_processes(fail, kind)
    assert first.error is not None and first.error.startswith(told), first
    assert second.error is not None and "ProcessError" not in second.error


def fail_and_linger() -> None:
    failures.LOOK, failures.GRACE = 0.1, 0.5
    fail("hangs")


@pytest.mark.slow
def test_a_process_that_waits_for_one_that_lingers_is_ended() -> None:
    """As with NCCL, whose connections do not break."""
    first, _ = in_processes(fail_and_linger, seconds=10)
    assert first == Outcome(None, "no answer", DataError.exit_code)


def succeed() -> int:
    state = join_processes(torch.device("cpu"))
    with shared_failures():
        wait_for_each_other()
    return state.process_index


@pytest.mark.slow
def test_processes_that_succeed_end_as_usual() -> None:
    assert [outcome.result for outcome in in_processes(succeed)] == [0, 1]
