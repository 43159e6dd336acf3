"""Task of a run: its labels, the options of the model's head, and losses that the model does not compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakeet.config import TaskName
from lorakeet.inference.answers import span_logits
from lorakeet.inference.predict import embed
from lorakeet.lora.config import TaskType

_PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


#: Name of the command that asks a model.
Verb = Literal["generate", "predict"]


@dataclass(frozen=True)
class Task:
    """A task with its labels.

    Attributes:
        name: A concrete name of :data:`lorakeet.config.TaskName`.
        problem: Problem of SEQ_CLS: single_label, multi_label or regression.
        labels: Names of the classes or tags, by id.
    """

    name: TaskName = "CAUSAL_LM"
    problem: str | None = None
    labels: tuple[str, ...] | None = None

    @property
    def peft_type(self) -> str | None:
        """The task's name in an adapter's configuration; masked language modelling has none there."""
        return self.name if self.name in list(TaskType) else None

    @property
    def verb(self) -> Verb:
        """The command that asks a model of the task."""
        return "generate" if self.name in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else "predict"

    def model_options(self) -> dict[str, Any]:
        """Return arguments of ``from_pretrained`` for the size and the names of a classifier's outputs."""
        if self.problem == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        if self.labels is None:
            return {}
        names = dict(enumerate(self.labels))
        options = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
        return {**options, "problem_type": _PROBLEMS[self.problem]} if self.problem else options

    def notes(self) -> dict[str, Any]:
        """Return the entry of ``lorakeet.json`` from which the head is built again with its names."""
        return {
            "type": self.name,
            "problem": self.problem,
            "labels": None if self.labels is None else list(self.labels),
        }

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any]) -> Task:
        """Return the task of an entry of :meth:`notes`."""
        labels = notes.get("labels")
        return cls(notes["type"], notes.get("problem"), None if labels is None else tuple(labels))


def embed_pairs(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Embed anchors, positives and, if present, negatives of a batch in one forward pass: fp32 [B, hidden] each."""
    parts = [part for part in ("", "positive_", "negative_") if f"{part}input_ids" in batch]
    longest = max(batch[f"{part}input_ids"].shape[1] for part in parts)
    ids, mask = (
        torch.cat([F.pad(batch[part + name], (0, longest - batch[part + name].shape[1])) for part in parts])
        for name in ("input_ids", "attention_mask")
    )
    return list(embed(model, ids, mask).chunk(len(parts)))


def span_loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the mean of the cross-entropies of start and end over real tokens, as in BERT (arXiv:1810.04805, 4.2).

    The models' own loss includes padding, so it depends on the longest row of the batch.
    """
    start, end = span_logits(outputs, batch["attention_mask"].eq(0))
    return (F.cross_entropy(start, batch["start_positions"]) + F.cross_entropy(end, batch["end_positions"])) / 2
