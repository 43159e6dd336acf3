"""The Trainer of every task but causal language modelling: losses of pairs and spans, and the task's own figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from lorakeet.patches.causal_loss import count_targets
from lorakeet.rng import same_random_state
from lorakeet.tasks.measure import OWN_LOSS, TaskMeasure, own_loss
from lorakeet.tasks.task import Task
from lorakeet.train.trainer import Trainer


class TaskTrainer(Trainer):
    """Trains a model for a :class:`lorakeet.tasks.task.Task`; otherwise as :class:`lorakeet.train.trainer.Trainer`.

    Args:
        task: The task; its labels name the figures.
        answers: Rows with ``context`` and ``answers``, as the samples of QUESTION_ANS number them.
    """

    def __init__(
        self, *rest: Any, task: Task, answers: Sequence[Mapping[str, Any]] | None = None, **settings: Any
    ) -> None:
        super().__init__(*rest, **settings)
        self.task, self.answers = task, answers
        self.predictions: EvalPrediction | None = None  # of the last measurement, for plots
        if task.name in OWN_LOSS:
            self.model_accepts_loss_kwargs, self._counts_known = False, True

    # ---- loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the model's loss; for pairs and spans the loss of the task.

        Args:
            model: The model, wrapped for several processes or not.
            inputs: A micro-batch on the model's device.
            return_outputs: Return ``(loss, outputs)``.
            num_items_in_batch: Targets of the whole step.
        """
        if self.task.name not in OWN_LOSS:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = own_loss(self.task, model, inputs)
        if num_items_in_batch is not None and model.training:
            loss = loss * self.share(count_targets(inputs, shifted=False), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def why_separate(self) -> str | None:
        """Return why micro-batches may not share a pass: the loss of a pair depends on the others of its pass."""
        if self.task.name == "FEATURE_EXTRACTION":
            return "the loss of a pair depends on the others of its micro-batch"
        return super().why_separate()

    # ---- measurement ------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure the loss per target and the task's figures.

        Args:
            dataloader: Batches of the held-out rows.
            description, prediction_loss_only, ignore_keys: accepted as the parent does, and not used.
            metric_key_prefix: Begins the name of each figure.
        """
        measure = TaskMeasure(self.task, self.processing_class, self.answers)
        with same_random_state():
            torch.manual_seed(self.args.seed)  # the same tokens are masked in every measurement
            batches = self._every_batch(dataloader)
            output = self._measure(measure, self.model, ([batch] for batch in batches), batches, metric_key_prefix)
        self.predictions = measure.predictions or self.predictions
        return output

    def evaluate_batch(self, batch: dict[str, Tensor]) -> None:
        """Run a batch as an evaluation does, and drop the result."""
        TaskMeasure(self.task, self.processing_class, generated=0).score(self.model, batch)
