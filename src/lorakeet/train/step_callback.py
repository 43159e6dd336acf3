"""What the Trainer does at the events of its loop: first-step checks, a collator that knows the epoch, finiteness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments

from lorakeet.errors import TrainingError
from lorakeet.log import warn
from lorakeet.rng import random_state, set_random_state
from lorakeet.train import nonfinite, preflight

if TYPE_CHECKING:
    from lorakeet.train.trainer import Trainer


class Steps(TrainerCallback):
    """Sees to every optimizer step of a :class:`lorakeet.train.trainer.Trainer`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.first = True
        self.start: dict[str, Any] = {}  # what a step that must not count has changed

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        self.first = True
        trainer._passes.restart()
        preflight.check_sharded(trainer.model_wrapped, args)
        trainer.rehearse()
        if resumed := trainer._resumed:
            trainer._tr_loss += resumed["unlogged"]
            trainer._total_loss_scalar = resumed["logged"]
            trainer._globalstep_last_logged = int(resumed["last_logged"])

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.trainer._collator is not None:
            self.trainer._collator.epoch = int(state.epoch or 0)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer._losses.clear()
        self.start = {
            "random": random_state(),
            "loss": self.trainer._tr_loss.clone(),
            "tokens": state.num_input_tokens_seen,
        }

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer, model = self.trainer, self.trainer.model
        if self.first:
            preflight.check_gradients(model)
            preflight.check_synchronized(model, trainer.accelerator)
            self.first = False
        if nonfinite.is_finite(trainer):
            return
        complaint = nonfinite.complaint(trainer)
        trainer.model_wrapped.zero_grad()  # no gradient, no change: the optimizer passes over it
        if trainer.non_finite == "skip":
            warn(f"step skipped: {complaint}")
            return
        set_random_state(self.start["random"])
        trainer._tr_loss.copy_(self.start["loss"])
        state.num_input_tokens_seen = self.start["tokens"]
        raise TrainingError(complaint, nonfinite.keep_last_good_state(trainer))
