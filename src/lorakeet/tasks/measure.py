"""Loss and figures of a task on held-out samples, for trainings and ``lorakeet eval`` alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from transformers import EvalPrediction

from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.inference.answers import answer_texts, best_answers, span_logits, window_answers
from lorakeet.patches.causal_loss import count_targets
from lorakeet.patches.fused_loss import fused_sample_losses
from lorakeet.tasks.metrics import compute_metrics_for, loss_and_perplexity
from lorakeet.tasks.retrieval import CandidateTexts, pair_loss, retrieval, summed_pair_loss
from lorakeet.tasks.task import Task, embed_pairs, span_loss
from lorakeet.tasks.text_metrics import answering

#: Held-out texts that a sequence-to-sequence model generates for its figures; all of them count for the loss.
GENERATED = 100
#: Tasks whose loss is computed here: the model has none, or one that also counts padding.
OWN_LOSS = ("FEATURE_EXTRACTION", "QUESTION_ANS")
#: Tasks whose loss is a mean over tokens, so that a perplexity makes sense.
PER_TOKEN = ("SEQ_2_SEQ_LM", "MASKED_LM")
#: Columns of a batch that the model takes, where the loss is computed here.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class Sums:
    """Sums over held-out samples.

    Attributes:
        loss: Summed loss of all targets, in nats.
        targets: Number of targets.
        samples: Number of samples.
        outcomes: What the figures need of each sample: mostly its prediction and its right value.
    """

    loss: float = 0.0
    targets: int = 0
    samples: int = 0
    outcomes: list[Any] = field(default_factory=list)

    def add(self, other: Sums) -> None:
        """Add the sums of further samples."""
        self.loss += other.loss
        self.targets += other.targets
        self.samples += other.samples
        self.outcomes += other.outcomes


class Measure(Protocol):
    """Scores of batches, and the figures of all scores together."""

    def score(self, model: nn.Module, batch: Mapping[str, Any], before: int = 0) -> Sums:
        """Return the sums of one batch that lies on the model's device, ``before`` samples behind the first one."""

    def figures(self, sums: Sums) -> dict[str, Any]:
        """Return ``{"loss", ...}`` of all samples."""


class TokenMeasure:
    """Mean loss per target token of a causal language model, and its perplexity."""

    def score(self, model: nn.Module, batch: Mapping[str, Any], before: int = 0) -> Sums:
        """Return the sums of one batch; no logits are held whole where the model allows it."""
        losses, targets = fused_sample_losses(model, batch)
        return Sums(float(losses.cpu().double().sum()), int(targets.sum()), len(targets))

    def figures(self, sums: Sums) -> dict[str, Any]:
        """Return ``{"loss", "perplexity", "tokens"}``."""
        return loss_and_perplexity(sums.loss, sums.targets)


class TaskMeasure:
    """Loss per target and figures of every task but causal language modelling.

    Args:
        task: The task; its labels name the figures.
        tokenizer: Decodes generated texts; None where the task has none.
        rows: Rows with ``context`` and ``answers``, as the samples of QUESTION_ANS number them.
        generated: Texts that a sequence-to-sequence model generates at most, those of the first samples.

    Attributes:
        predictions: Predictions and labels of all samples, once :meth:`figures` has been called; for plots.
    """

    def __init__(
        self, task: Task, tokenizer: Any, rows: Sequence[Mapping[str, Any]] | None = None, generated: int = GENERATED
    ) -> None:
        self.task, self.tokenizer, self.rows, self.generated = task, tokenizer, rows, generated
        self.predictions: EvalPrediction | None = None

    def score(self, model: nn.Module, batch: Mapping[str, Any], before: int = 0) -> Sums:
        """Return the sums and the outcomes of one batch."""
        count, name = count_targets(batch, shifted=False), self.task.name
        if name == "FEATURE_EXTRACTION":  # its loss is that of all samples together
            outcomes = _embedded(embed_pairs(model, batch), batch)
            return Sums(0.0, count, len(outcomes), outcomes)
        if name == "QUESTION_ANS":
            loss, outputs = own_loss(self.task, model, batch)
        else:
            outputs = model(**batch)
            loss = outputs.loss
        outcomes = self._predicted(outputs, batch)
        if name == "SEQ_2_SEQ_LM" and before < self.generated:
            outcomes = self._generated(model, {key: value[: self.generated - before] for key, value in batch.items()})
        return Sums((float(loss) if count else 0.0) * count, count, len(batch["input_ids"]), outcomes)

    def figures(self, sums: Sums) -> dict[str, Any]:
        """Return ``{"loss", "targets", ...}`` with the figures of the task."""
        loss: float = sums.loss
        further: Mapping[str, Any] = {}
        if self.task.name == "FEATURE_EXTRACTION" and sums.outcomes:
            loss, further = _pair_figures(sums.outcomes)
        elif self.task.name == "QUESTION_ANS" and sums.outcomes:
            further = self._answer_figures(sums.outcomes)
        elif sums.outcomes:
            predicted, right = (_stack(list(part)) for part in zip(*sums.outcomes, strict=True))
            self.predictions = EvalPrediction(predictions=predicted, label_ids=right)
            further = compute_metrics_for(self.task.name, self.task.problem, self.task.labels)(self.predictions)
        figures: dict[str, Any] = loss_and_perplexity(loss, sums.targets)
        figures["targets"] = figures.pop("tokens")
        if self.task.name not in PER_TOKEN:
            figures.pop("perplexity")
        return {**figures, **further}

    def _predicted(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        if self.task.name == "SEQ_CLS":
            return list(zip(_rows(outputs.logits.float()), _rows(batch["labels"]), strict=True))
        if self.task.name in ("TOKEN_CLS", "MASKED_LM"):
            best, labels = outputs.logits.argmax(-1), batch["labels"]
            real = labels.ne(IGNORE_INDEX)
            return [(b[r].cpu().numpy(), y[r].cpu().numpy()) for b, y, r in zip(best, labels, real, strict=True)]
        if self.task.name == "QUESTION_ANS":
            return list(window_answers(*span_logits(outputs, batch["attention_mask"].eq(0)), batch))
        return []

    def _answer_figures(self, windows: Sequence[Any]) -> dict[str, float]:
        """Return the figures of the answers, one for each question over all of its windows."""
        if self.rows is None:
            raise ValueError("the figures of answers need the rows of the questions")
        best = best_answers(windows)
        return answering(answer_texts(best, self.rows), [self.rows[number]["answers"] for number in best])

    def _generated(self, model: Any, batch: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        """Return the text that the model generates greedily from each source, and the target."""
        labels = batch["labels"]
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        texts = model.generate(**source, max_new_tokens=labels.shape[1] + 8, do_sample=False, num_beams=1)
        right = (row[row.ne(IGNORE_INDEX)] for row in labels)
        return [(self._decode(text), self._decode(target)) for text, target in zip(texts, right, strict=True)]

    def _decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def measure_for(task: Task, tokenizer: Any, rows: Sequence[Mapping[str, Any]] | None = None) -> Measure:
    """Return a fresh measure of a task; ``rows`` as for :class:`TaskMeasure`."""
    return TokenMeasure() if task.name == "CAUSAL_LM" else TaskMeasure(task, tokenizer, rows)


def own_loss(task: Task, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """Return loss and outputs for a task of :data:`OWN_LOSS`."""
    if task.name == "FEATURE_EXTRACTION":
        anchors, positives, *negatives = vectors = embed_pairs(model, batch)
        own, *others = pair_texts(batch)
        texts = CandidateTexts(own, [text for part in others for text in part])
        return pair_loss(anchors, positives, negatives[0] if negatives else None, texts), {"embeddings": vectors}
    outputs = model(**{name: batch[name] for name in _INPUTS if name in batch})
    return span_loss(outputs, batch), outputs


def pair_texts(batch: Mapping[str, Tensor]) -> list[list[bytes]]:
    """Return the texts of the anchors, the positives and, if present, the negatives, as token ids without padding."""
    texts = []
    for part in ("", "positive_", "negative_"):
        if f"{part}input_ids" in batch:
            ids, mask = (batch[part + name].cpu() for name in ("input_ids", "attention_mask"))
            texts.append([row[real].numpy().tobytes() for row, real in zip(ids, mask.bool(), strict=True)])
    return texts


def _embedded(vectors: Sequence[Tensor], batch: Mapping[str, Tensor]) -> list[Any]:
    """Return the vectors and the texts of each row: of its anchor, its positive and, if present, its negative."""
    texts = zip(*pair_texts(batch), strict=True)
    return list(zip(zip(*map(_rows, vectors), strict=True), texts, strict=True))


def _pair_figures(outcomes: Sequence[Any]) -> tuple[float, dict[str, float]]:
    """Return the summed loss and the figures of finding each positive among the texts of all outcomes."""
    vectors, texts = (list(zip(*part, strict=True)) for part in zip(*outcomes, strict=True))
    anchors, positives, *negatives = map(np.stack, vectors)
    further = [text for part in texts[1:] for text in part]
    loss = summed_pair_loss(anchors, np.concatenate([positives, *negatives]), CandidateTexts(texts[0], further))
    return loss, retrieval(anchors, positives, CandidateTexts(texts[0], texts[1]))


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
