"""Handling of Ctrl-C and SIGTERM: a run ends after the current step, with a checkpoint to resume from."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

from lorakeet.log import info

#: Seconds after a Ctrl-C in which a second one is ignored: torchrun sends the terminal's signal again.
ECHO = 2.0


def resume_command(file: Path) -> str:
    """Return the command that resumes a run, with as many processes as this one has.

    Args:
        file: The ``run.yaml`` of the run.
    """
    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = f" --nnodes {processes // here}" if processes > here else ""
    start = f"torchrun{nodes} --nproc-per-node {here} -m lorakeet" if processes > 1 else "lorakeet"
    return f"{start} train {file} --resume"


class StopAfterStep(TrainerCallback):
    """Context in which a signal stops training after its step and saves; a second Ctrl-C stops at once.

    Before the first step and after the last, Ctrl-C stops at once too. All processes stop after the same step.

    Attributes:
        stopped: Whether the training was stopped.
    """

    def __init__(self) -> None:
        self.requested = self.stopped = self.training = False
        self._before: dict[int, Any] = {}
        self._requested_at = 0.0

    def __enter__(self) -> StopAfterStep:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.training:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._requested_at = True, now
            info("finishing this step, then saving; Ctrl-C once more to stop at once")
        elif number == signal.SIGINT and now - self._requested_at > ECHO:
            raise KeyboardInterrupt

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._any_process_requested(args):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def _any_process_requested(self, args: Any) -> bool:
        if args.world_size == 1:
            return self.requested
        requested = torch.tensor(float(self.requested), device=args.device)
        torch.distributed.all_reduce(requested)
        return bool(requested)
