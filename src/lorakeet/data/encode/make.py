"""Encoders of canonical rows, one for each kind of data and task, from the registry of kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.read.record import Fault, Location
from lorakeet.data.rows.kinds import Layout, find_kind
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.errors import DataError

#: Rows that cannot be samples and are written out in an error; further ones are counted.
_SHOWN = 3


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


def cannot_encode(faults: Sequence[tuple[Location | str, Fault]], source: str) -> DataError:
    """Return one error for all rows that cannot be samples, given by location and fault."""
    more = f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
    shown = "; ".join(f"{location}: {fault.message}" for location, fault in faults[:_SHOWN])
    hint = next((fault.hint for _, fault in faults if fault.hint), None)
    return DataError(f"{len(faults):,} row{'s' * (len(faults) > 1)} of {source} cannot be learned: {shown}{more}", hint)
