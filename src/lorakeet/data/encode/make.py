"""Encoders of canonical rows, one for each kind of data and task, from the registry of kinds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.rows.kinds import Layout, find_kind
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.errors import DataError


def make_encoder(
    layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: LabelSet | None = None
) -> Encoder:
    """Make the encoder for rows of ``layout`` and a concrete ``task``.

    Args:
        layout: Kind and columns of the rows.
        task: What is trained.
        settings: ``max_length`` and ``learn``.
        tokenizer: Of ``transformers``.
        labels: Names of the classes or tags, where the kind has any.

    Raises:
        DataError: ``data.learn`` asks for completions of rows that have none, or the rows are not for this task.
        BaseModelError: the tokenizer cannot do what the task needs.
    """
    make = find_kind(layout.kind).encoders.get(task.type)
    if make is None:
        raise DataError(f"rows of {layout.kind} are not for {task.type}", "choose another task: task.type")
    encoder: Encoder = make(layout, task, settings, tokenizer, labels)
    return encoder


def complaint(faults: Iterable[tuple[object, str]], source: str, shown: int = 3) -> DataError:
    """One error for all rows that cannot be samples: ``faults`` are their places and what is wrong."""
    told = [
        (f"{place}: {sentence}", hint) for place, fault in faults for sentence, _, hint in [fault.partition("\nhint: ")]
    ]
    more = f"; and {len(told) - shown:,} more" if len(told) > shown else ""
    sentences = "; ".join(sentence for sentence, _ in told[:shown])
    hint = next((hint for _, hint in told if hint), None)
    return DataError(f"{len(told):,} row{'s' * (len(told) > 1)} of {source} cannot be learned: {sentences}{more}", hint)
