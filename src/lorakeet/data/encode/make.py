"""Canonical rows to samples of token ids: one encoder for each kind of rows and task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.encode.chat import chat_encoder
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.tasks import task_encoder
from lorakeet.data.encode.text import CompletionEncoder, TextEncoder
from lorakeet.data.rows.column_mapping import Layout
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.errors import DataError


def make_encoder(
    layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: LabelSet | None = None
) -> Encoder:
    """The encoder for rows of ``layout.kind`` and a concrete ``task``.

    Raises:
        DataError: ``data.learn`` asks for completions of rows that have none, or the rows are not for this task.
        BaseModelError: the tokenizer cannot do what the task needs.
    """
    most = settings.max_length
    if task.type == "CAUSAL_LM":
        if settings.learn == "completion" and layout.kind == "text":
            raise DataError(
                "data.learn=completion, but the rows are plain texts",
                "give rows with prompt and completion, or with messages",
            )
        learn_all = settings.learn == "all" or layout.kind == "text"
        if layout.kind == "messages":
            return chat_encoder(layout, tokenizer)(tokenizer, most, learn_all)
        if layout.kind in ("text", "completion"):
            return (TextEncoder if layout.kind == "text" else CompletionEncoder)(tokenizer, most, learn_all)
    return task_encoder(layout, task, most, tokenizer, labels)


def complaint(faults: Iterable[tuple[str, str]], source: str, shown: int = 3) -> DataError:
    """One error for all rows that cannot be samples: ``faults`` are their places and what is wrong."""
    told = [
        (f"{place}: {sentence}", hint) for place, fault in faults for sentence, _, hint in [fault.partition("\nhint: ")]
    ]
    more = f"; and {len(told) - shown:,} more" if len(told) > shown else ""
    sentences = "; ".join(sentence for sentence, _ in told[:shown])
    hint = next((hint for _, hint in told if hint), None)
    return DataError(f"{len(told):,} row{'s' * (len(told) > 1)} of {source} cannot be learned: {sentences}{more}", hint)
