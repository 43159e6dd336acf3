"""Callback of the Trainer at the events of its loop: checks of the first step, the collator's epoch, finite values."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from lorakeet.errors import TrainingError
from lorakeet.log import warn
from lorakeet.train.guards import nonfinite, preflight
from lorakeet.train.step_state import StepHost

_NONFINITE_HINT = "check these samples, lower the learning rate, or skip such steps: Trainer(..., non_finite='skip')"


class StepCallback(TrainerCallback):
    """Checks every optimizer step of a :class:`lorakeet.train.trainer.Trainer` before it is applied."""

    def __init__(self, host: StepHost) -> None:
        self.host = host
        self.first = True

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.first = True
        self.host.begin_training()

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.host.begin_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.host.begin_step()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        host = self.host
        if self.first:
            preflight.check_gradients(host.model)
            preflight.check_synchronized(host.model, host.accelerator)
            self.first = False
        if nonfinite.is_finite(host.step, host.accelerator):
            return
        decode = getattr(host.processing_class, "decode", None)
        error = nonfinite.nonfinite_error(host.step, state.global_step + 1, host.micro_batch_loss, decode)
        host.model_wrapped.zero_grad()  # without gradients the optimizer changes nothing
        if host.non_finite == "skip":
            warn(f"step skipped: {error}")
            return
        host.undo_step()
        folder = host.save_last_good_state()
        raise TrainingError(
            error, _NONFINITE_HINT if folder is None else f"the last good state is in {folder}; {_NONFINITE_HINT}"
        )
