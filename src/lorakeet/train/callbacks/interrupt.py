"""Handling of Ctrl-C, SIGTERM and SIGHUP: a run ends after the current step, with a checkpoint to resume from."""

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
#: Signals that end a run: Ctrl-C, the stop of a cluster or machine, and a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def resume_command(file: Path) -> str:
    """Return the command that resumes a run, with as many processes as this one has.

    Args:
        file: The ``run.yaml`` of the run.
    """
    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = f" --nnodes {processes // here}" if processes > here else ""
    start = f"torchrun{nodes} --nproc-per-node {here} -m lorakeet" if processes > 1 else "lorakeet"
    return f"{start} train {file} --resume"


def any_process(flag: bool, args: Any) -> bool:
    """Whether ``flag`` is set in any process; all processes ask at the same step and get the same answer.

    Args:
        flag: The flag of this process.
        args: TrainingArguments of the run.
    """
    if args.world_size == 1:
        return flag
    count = torch.tensor(float(flag), device=args.device)
    torch.distributed.all_reduce(count)
    return bool(count)


class EvaluationStoppedError(Exception):
    """A signal came during an evaluation inside the training; the Trainer saves, and the resumed run evaluates again."""


class StopAfterStep(TrainerCallback):
    """Context in which a signal stops training after its step and saves; a second Ctrl-C stops at once.

    An evaluation inside the training is broken off. Before the first step and after the last, where nothing would be
    lost, a signal stops at once. All processes stop after the same step.

    Attributes:
        stopped: Whether the training was stopped.
    """

    def __init__(self) -> None:
        self.requested = self.stopped = self.training = False
        self._before: dict[int, Any] = {}
        self._requested_at = 0.0

    def __enter__(self) -> StopAfterStep:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
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
        if any_process(self.requested, args):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.training and self.requested and args.world_size == 1:  # several processes take unequal shares
            self.stopped = True
            raise EvaluationStoppedError

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.training:
            self.on_step_end(args, state, control)
