"""The part of the Trainer that guards a training: checks and rehearsal before it, faults of its steps, lack of memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import datasets
import torch
from torch.utils.data import IterableDataset
from transformers.trainer_utils import TrainOutput

from lorakeet.data.prepared import LocatedStream
from lorakeet.rng import random_state, set_random_state
from lorakeet.train.checkpoints.resumable import ResumableTrainer
from lorakeet.train.guards import preflight
from lorakeet.train.guards.memory import memory_errors
from lorakeet.train.guards.rehearsal import rehearse
from lorakeet.train.guards.sample_order import sample_numbers
from lorakeet.train.guards.spikes import SpikeDetector
from lorakeet.train.step_state import Reaction, StepState


class GuardedTrainer(ResumableTrainer):
    """Holds the state of the current step and what guards it; :class:`lorakeet.train.trainer.Trainer` documents both."""

    callback_handler: Any

    def __init__(
        self,
        *rest: Any,
        non_finite: Literal["stop", "skip"],
        spike: Reaction,
        locations: Sequence[object] | LocatedStream | None,
        **settings: Any,
    ) -> None:
        super().__init__(*rest, **settings)
        self._reactions: dict[str, Reaction] = {"non_finite": non_finite, "spike": spike}
        self.locations = locations
        self.step = StepState()
        self._pass_began: tuple[int, int] | None = None
        self._operations_per_token: int | None = None
        self.add_callback(SpikeDetector())

    def train(self, *rest: Any, **settings: Any) -> TrainOutput:
        """Train as the parent does; lack of memory is an error with advice."""
        with memory_errors(lambda: f"step {self.state.global_step + 1} of {self.state.max_steps}"):
            return super().train(*rest, **settings)

    def evaluate(self, *rest: Any, **settings: Any) -> dict[str, float]:
        """Evaluate as the parent does; lack of memory is an error with advice."""
        with self.memory_errors_in("an evaluation"):
            figures: dict[str, float] = super().evaluate(*rest, **settings)
        return figures

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count as the parent does, which counts the model's parameters anew for every micro-batch: milliseconds each."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs:
            return 0
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops({name: torch.empty(1)})
        return self._operations_per_token * inputs[name].numel()

    def memory_errors_in(self, during: str) -> AbstractContextManager[None]:
        """Return the context that turns lack of memory into an error; none where the batch size is lowered instead."""
        return nullcontext() if self.args.auto_find_batch_size else memory_errors(lambda: during)

    # ---- what helpers of a step ask for (lorakeet.train.step_state.StepHost) ------------------------------------

    @property
    def spikes(self) -> SpikeDetector:
        """Figures of the last steps; a checkpoint holds them."""
        found: SpikeDetector = next(c for c in self.callback_handler.callbacks if isinstance(c, SpikeDetector))
        return found

    def reaction(self, fault: Literal["non_finite", "spike"]) -> Reaction:
        """Return the reaction to a kind of fault of a step."""
        return self._reactions[fault]

    def sample_places(self, micro_batch: int) -> list[str]:
        """Return where each sample of a micro-batch of the step is in the data; none where that is unknown."""
        args, loader = self.args, self.callback_handler.train_dataloader
        if isinstance(self.train_dataset, (IterableDataset, datasets.IterableDataset)):
            if self._pass_began is None or self.locations is None or isinstance(self.locations, Sequence):
                return []
            epoch, began = self._pass_began
            batch = (self.state.global_step - began) * args.gradient_accumulation_steps + micro_batch
            first = (batch * args.world_size + args.process_index) * args.per_device_train_batch_size
            return self.locations.of_samples(epoch, first, first + args.per_device_train_batch_size)
        numbers = sample_numbers(loader, self.state.global_step, args.gradient_accumulation_steps, micro_batch)
        if isinstance(self.locations, Sequence):
            return [str(self.locations[number]) for number in numbers]
        return [f"train_dataset[{number}]" for number in numbers]

    def begin_training(self) -> None:
        """Check that the training can run, save and evaluate; restore the progress of a resumed run."""
        preflight.check_sharded(self.model_wrapped, self.args)
        preflight.announce_unfrozen(self.model)
        self._pass_began = self._operations_per_token = None
        rehearse(self)
        self._restore_progress()

    def begin_epoch(self, epoch: int) -> None:
        """Keep the step with which a pass over the data began; of a resumed later pass over a stream it is unknown."""
        if self._pass_began is not None or not epoch:
            self._pass_began = epoch, 0 if not epoch else self.state.global_step

    def begin_step(self) -> None:
        """Keep random numbers, summed loss and token count from before a step."""
        tokens = self.state.num_input_tokens_seen
        self.step.begin({"random": random_state(), "loss": self._tr_loss.clone(), "tokens": tokens})

    def undo_step(self) -> None:
        """Restore random numbers, summed loss and token count from before the step."""
        set_random_state(self.step.before["random"])
        self._tr_loss.copy_(self.step.before["loss"])
        self.state.num_input_tokens_seen = self.step.before["tokens"]
