"""Callback of the Trainer at the events of its loop: checks of the first step, the collator's epoch, faults of a step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from lorakeet.errors import TrainingError
from lorakeet.log import warn
from lorakeet.train.guards import preflight
from lorakeet.train.guards.step_faults import StepFault, describe_fault, find_fault, step_figures
from lorakeet.train.step_state import StepHost

#: Steps. Skipped ones in a row that stop a run: perhaps none would ever count.
MOST_SKIPPED = 20
#: Hint for each kind of fault: the settings that go on.
_HINTS = {
    "non_finite": "check these samples, lower the learning rate, or skip such steps: --resume --on-nonfinite skip "
    "(Trainer(..., non_finite='skip'))",
    "spike": "check these samples, lower the learning rate, or skip such steps: --resume --on-spike skip; "
    "--on-spike warn applies them (Trainer(..., spike='skip'))",
}


class StepCallback(TrainerCallback):
    """Checks every optimizer step of a :class:`lorakeet.train.trainer.Trainer` before it is applied."""

    def __init__(self, host: StepHost) -> None:
        self.host = host
        self.first = True
        self.skipped = 0  # steps in a row

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.first, self.skipped = True, 0
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
        figures = step_figures(host.step, host.accelerator)
        fault = find_fault(figures, state.global_step + 1, host.spikes)
        if fault is None or host.reaction(fault.kind) == "warn":
            host.spikes.add(figures)
            self.skipped = 0
        if fault is not None:
            self._react(fault)

    def _react(self, fault: StepFault) -> None:
        """Stop, skip the step, or warn, as the settings say.

        Raises:
            TrainingError: The run stops; the step is not applied, and the last good state is saved.
        """
        host, reaction = self.host, self.host.reaction(fault.kind)
        if reaction == "warn":
            warn(fault.sentence)
            return
        error = describe_fault(fault, host)
        host.model_wrapped.zero_grad()  # without gradients the optimizer changes nothing
        self.skipped += 1
        if reaction == "skip" and self.skipped < MOST_SKIPPED:
            warn(f"step skipped: {error}")
            return
        host.undo_step()
        if self.skipped > 1:
            error = f"{self.skipped} steps in a row were skipped, the last because {error}"
        if broken := preflight.nonfinite_parameters(host.model):
            raise TrainingError(f"{broken}; {error}", "resume from an earlier checkpoint, with a lower learning rate")
        folder = host.save_last_good_state()
        hint = (
            _HINTS[fault.kind] if reaction == "stop" else "the model may be damaged: begin with a lower learning rate"
        )
        raise TrainingError(error, hint if folder is None else f"the last good state is in {folder}; {hint}")
