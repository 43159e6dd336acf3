"""Checkpoints by time: every few minutes, rarer where saving is slow, and one at the end of the training."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from lorakeet.train.callbacks.interrupt import any_process

#: Largest share of the time that saving takes by itself.
LARGEST_SHARE = 0.01


class SaveByTime(TrainerCallback):
    """Callback that asks for a checkpoint at the end of a step; the main process decides for all.

    The checkpoint at the end is for a run that is stopped while it writes its adapter or measures.

    Args:
        minutes: Time between two checkpoints.
        save_seconds: Times that the saves took so far, in seconds; the Trainer appends to it.
    """

    def __init__(self, minutes: float, save_seconds: list[float]) -> None:
        self.interval = minutes * 60
        self.save_seconds = save_seconds
        self._last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last_save = self.save_seconds[-1] if self.save_seconds else 0.0
        is_due = time.monotonic() - self._last >= max(self.interval, last_save / LARGEST_SHARE)
        is_last = state.global_step >= state.max_steps
        if is_last or any_process(is_due and state.is_world_process_zero, args):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = time.monotonic()
