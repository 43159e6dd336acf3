"""State of one optimizer step, and the part of a Trainer that helpers of a step may use.

The Trainer owns a :class:`StepState`. Packing of micro-batches, the check for non-finite values and the step callback
receive it, or the Trainer as a :class:`StepHost`, and read no private field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from lorakeet.train.guards.spikes import SpikeDetector

Batch = Mapping[str, Any]
#: Reaction to a fault of a step: stop the run, leave out the step, or warn and apply it.
Reaction = Literal["stop", "skip", "warn"]


@dataclass(frozen=True)
class ForwardPass:
    """A forward and backward pass of the step that has run.

    Attributes:
        loss: Scalar, as it was added to the step's loss.
        batches: The micro-batches that shared the pass.
    """

    loss: Tensor
    batches: list[Batch]


@dataclass
class StepState:
    """An optimizer step while it is computed.

    Attributes:
        passes: Forward and backward passes that have run.
        targets: Targets of the step over all micro-batches and processes; None where the loss does not need them.
        grad_norm: Norm of the gradient before clipping; None until it is known.
        before: Trainer state before the step, restored if the step is discarded.
    """

    passes: list[ForwardPass] = field(default_factory=list)
    targets: Any = None
    grad_norm: Any = None
    before: dict[str, Any] = field(default_factory=dict)

    def begin(self, before: dict[str, Any]) -> None:
        """Clear the passes of the last step and keep the state before this one."""
        self.passes.clear()
        self.before = before

    @property
    def batches(self) -> list[Batch]:
        """Micro-batches of all passes, in order."""
        return [batch for each in self.passes for batch in each.batches]


class StepHost(Protocol):
    """The part of a Trainer that helpers of a step use.

    Attributes:
        step: The step that is computed.
        spikes: Figures of the steps before it.
        model, model_wrapped, args, accelerator, processing_class, state: as in ``transformers.Trainer``.
    """

    step: StepState
    spikes: SpikeDetector
    model: Any
    model_wrapped: Any
    args: Any
    accelerator: Any
    processing_class: Any
    state: Any

    @property
    def running_model(self) -> Any:
        """The model to call outside the training loop."""

    def why_separate(self) -> str | None:
        """Return why micro-batches may not share a pass; None if they may."""

    def reaction(self, fault: Literal["non_finite", "spike"]) -> Reaction:
        """Return the reaction to a kind of fault of a step."""

    def sample_places(self, micro_batch: int) -> list[str]:
        """Return where each sample of a micro-batch of the step is in the data; none if that is unknown."""

    def micro_batch_loss(self, batch: Batch, targets: Any = None) -> Tensor:
        """Return the loss of one micro-batch on its own, outside the training loop."""

    def begin_training(self) -> None:
        """Check and restore what a training needs before its first step."""

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch that the collator's random numbers depend on."""

    def begin_step(self) -> None:
        """Keep the state before a step."""

    def undo_step(self) -> None:
        """Restore the state before the step."""

    def save_last_good_state(self) -> str | None:
        """Save a checkpoint of the last step that was applied; return its folder, None before the first step."""
