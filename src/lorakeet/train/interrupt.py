"""Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint to go on from."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

from lorakeet.log import info

#: Seconds in which a second Ctrl-C is taken for the echo of the first: torchrun passes on what the terminal sent already.
ECHO = 2.0


class StopAfterStep(TrainerCallback):
    """While this context is open, a signal stops training after its step and saves; a second Ctrl-C acts at once.

    Before the first step and after the last there is nothing to finish: there Ctrl-C acts at once too.

    Under several processes all stop after the same step. ``stopped`` says whether it happened.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = self.training = False
        self._before: dict[int, Any] = {}
        self._heard = 0.0

    def __enter__(self) -> StopAfterStep:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.training:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._heard = True, now
            info("finishing this step, then saving; Ctrl-C once more to stop at once")
        elif number == signal.SIGINT and now - self._heard > ECHO:
            raise KeyboardInterrupt

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._anyone_asked(args):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def _anyone_asked(self, args: Any) -> bool:
        if args.world_size == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(asked)
        return bool(asked)
