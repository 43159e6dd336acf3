"""Loss and figures of a task on held-out samples, for trainings and ``lorakeet eval`` alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.patches.causal_loss import count_targets
from lorakeet.patches.fused_loss import fused_sample_losses
from lorakeet.tasks.metrics import compute_metrics_for, loss_and_perplexity
from lorakeet.tasks.task import Task, embed_pairs, pair_loss, span_logits, span_loss

#: Held-out texts that a sequence-to-sequence model generates for its figures; all of them count for the loss.
GENERATED = 100
#: Tasks whose loss is computed here: the model has none, or one that also counts padding.
OWN_LOSS = ("FEATURE_EXTRACTION", "QUESTION_ANS")
#: Tasks whose loss is a mean over tokens, so that a perplexity makes sense.
PER_TOKEN = ("SEQ_2_SEQ_LM", "MASKED_LM")

#: Gathers values of samples from all processes, without the samples that only fill up the last batch.
Gather = Callable[[Any], Any]


def this_process(values: Any) -> Any:
    """Return the values unchanged: the :data:`Gather` of a single process."""
    return values


@dataclass
class Sums:
    """Sums over held-out samples.

    Attributes:
        loss: Summed loss of all targets, in nats.
        targets: Number of targets.
        samples: Number of samples.
        outcomes: Prediction and right value of each sample that has any.
    """

    loss: float = 0.0
    targets: int = 0
    samples: int = 0
    outcomes: list[tuple[Any, Any]] = field(default_factory=list)

    def add(self, other: Sums) -> None:
        """Add the sums of further samples."""
        self.loss += other.loss
        self.targets += other.targets
        self.samples += other.samples
        self.outcomes += other.outcomes


class Measure(Protocol):
    """Scores of batches, and the figures of all scores together."""

    def score(self, model: nn.Module, batch: Mapping[str, Any], gather: Gather = this_process) -> Sums:
        """Return the sums of one batch that lies on the model's device."""

    def figures(self, sums: Sums) -> dict[str, Any]:
        """Return ``{"loss", ...}`` of all samples."""


class TokenMeasure:
    """Mean loss per target token of a causal language model, and its perplexity."""

    def score(self, model: nn.Module, batch: Mapping[str, Any], gather: Gather = this_process) -> Sums:
        """Return the sums of one batch over all processes; no logits are held whole where the model allows it."""
        losses, targets = gather(fused_sample_losses(model, batch))
        return Sums(float(losses.cpu().double().sum()), int(targets.sum()), len(targets))

    def figures(self, sums: Sums) -> dict[str, Any]:
        """Return ``{"loss", "perplexity", "tokens"}``."""
        return loss_and_perplexity(sums.loss, sums.targets)


class TaskMeasure:
    """Loss per target and figures of every task but causal language modelling.

    Args:
        task: The task; its labels name the figures.
        tokenizer: Decodes answers and generated texts; None where the task has none.
        generated: Texts that a sequence-to-sequence model generates at most.

    Attributes:
        predictions: Predictions and labels of all samples, once :meth:`figures` has been called; for plots.
    """

    def __init__(self, task: Task, tokenizer: Any, generated: int = GENERATED) -> None:
        self.task, self.tokenizer, self.generated = task, tokenizer, generated
        self.predictions: EvalPrediction | None = None

    def score(self, model: nn.Module, batch: Mapping[str, Any], gather: Gather = this_process) -> Sums:
        """Return the sums of one batch of this process, and the outcomes of all processes."""
        if self.task.name in OWN_LOSS:
            loss, outputs = own_loss(self.task, model, batch)
        else:
            outputs = model(**batch)
            loss = outputs.loss
        if self.task.name == "SEQ_2_SEQ_LM" and self.generated > 0:
            outcomes = self._generated(model, batch)
            self.generated -= len(outcomes)
        else:
            outcomes = self._predicted(outputs, batch)
        count = count_targets(batch, shifted=False)
        gathered = gather(outcomes)
        return Sums((float(loss) if count else 0.0) * count, count, len(gathered), gathered)

    def figures(self, sums: Sums) -> dict[str, Any]:
        """Return ``{"loss", "targets", ...}`` with the figures of the task."""
        # a process sends its sum in fp32, so a single process rounds it alike
        figures: dict[str, Any] = loss_and_perplexity(float(np.float32(sums.loss)), sums.targets)
        figures["targets"] = figures.pop("tokens")
        if self.task.name not in PER_TOKEN:
            figures.pop("perplexity")
        if sums.outcomes:
            predicted, right = (_stack(list(part)) for part in zip(*sums.outcomes, strict=True))
            self.predictions = EvalPrediction(predictions=predicted, label_ids=right)
            figures |= compute_metrics_for(self.task.name, self.task.problem, self.task.labels)(self.predictions)
        return figures

    def _predicted(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
        if self.task.name == "FEATURE_EXTRACTION":
            return list(zip(*map(_rows, outputs["embeddings"][:2]), strict=True))
        if self.task.name == "SEQ_CLS":
            return list(zip(_rows(outputs.logits.float()), _rows(batch["labels"]), strict=True))
        if self.task.name in ("TOKEN_CLS", "MASKED_LM"):
            best, labels = outputs.logits.argmax(-1), batch["labels"]
            real = labels.ne(IGNORE_INDEX)
            return [(b[r].cpu().numpy(), y[r].cpu().numpy()) for b, y, r in zip(best, labels, real, strict=True)]
        if self.task.name == "QUESTION_ANS":
            spans = torch.stack([logits.argmax(-1) for logits in span_logits(outputs, batch)], dim=1)
            right = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
            return [
                (self._answer(ids, guess), self._answer(ids, answer))
                for ids, guess, answer in zip(batch["input_ids"], spans, right, strict=True)
            ]
        return []

    def _answer(self, ids: Tensor, span: Tensor) -> str:
        """Return the text between two positions; empty where both point at the first token, which means no answer."""
        start, end = span.tolist()
        return "" if end == 0 else self._decode(ids[start : end + 1])

    def _generated(self, model: Any, batch: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        """Return the text that the model generates greedily from each source, and the target."""
        labels = batch["labels"]
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        texts = model.generate(**source, max_new_tokens=labels.shape[1] + 8, do_sample=False, num_beams=1)
        right = (row[row.ne(IGNORE_INDEX)] for row in labels)
        return [(self._decode(text), self._decode(target)) for text, target in zip(texts, right, strict=True)]

    def _decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def measure_for(task: Task, tokenizer: Any) -> Measure:
    """Return a fresh measure of a task."""
    return TokenMeasure() if task.name == "CAUSAL_LM" else TaskMeasure(task, tokenizer)


def own_loss(task: Task, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Return loss and outputs for a task of :data:`OWN_LOSS`."""
    if task.name == "FEATURE_EXTRACTION":
        vectors = embed_pairs(model, batch)
        return pair_loss(*vectors), {"embeddings": vectors}
    outputs = model(**{name: value for name, value in batch.items() if not name.endswith("_positions")})
    return span_loss(outputs, batch), outputs


def _rows(values: Tensor) -> list[Any]:
    return list(values.detach().cpu().numpy())


def _stack(rows: list[Any]) -> Any:
    """Return one array of all rows; ragged rows are padded with -100, texts stay a list."""
    if isinstance(rows[0], str):
        return rows
    if rows[0].ndim == 0 or len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=IGNORE_INDEX) for row in rows])
