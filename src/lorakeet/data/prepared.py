"""Prepared samples, and the steps that preparing at once and preparing a stream share."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import datasets
import numpy as np

from lorakeet.config import TaskSettings
from lorakeet.data.doctor.issues import IssueGroup
from lorakeet.data.encode.chat import ChatEncoder
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.render import describe_sample
from lorakeet.data.prepare_report import PrepareReport
from lorakeet.data.read.record import Locations
from lorakeet.data.rows.conversations import system_turn_notes
from lorakeet.data.rows.kinds import Layout
from lorakeet.data.rows.label_set import LabelSet, Problem
from lorakeet.errors import DataError
from lorakeet.log import warn


class LocatedStream(Protocol):
    """Stream whose samples can be located by their number in a pass."""

    def of_samples(self, epoch: int, start: int, stop: int) -> list[str]:
        """Return the locations of the samples from number ``start`` to ``stop``."""


@dataclass(frozen=True)
class Prepared:
    """Samples with what the model takes and ``length``, unpadded, in the order of the data.

    Attributes:
        train: samples; of a stream they are made during training.
        held_out: samples; None where no row is held out.
        report: figures of the data.
        labels: names of the classes or tags by their number; None where there are none.
        problem: kind of a SEQ_CLS, else None.
        layout: kind of the rows, and which column of the source plays which part.
        train_locations: where the row of each training sample is.
        train_rows, held_out_rows: the rows that the samples were made of, in canonical columns (None for a stream).
    rows: all usable rows (of a stream the held-out ones), as the column ``row`` of samples numbers them; for a task whose
        samples have that column.
    """

    train: datasets.Dataset | datasets.IterableDataset
    held_out: datasets.Dataset | None
    report: PrepareReport
    labels: tuple[str, ...] | None
    problem: Problem | None
    layout: Layout
    train_locations: Locations | LocatedStream | None = None
    train_rows: datasets.Dataset | None = None
    held_out_rows: datasets.Dataset | None = None
    rows: datasets.Dataset | None = None
    chat: Mapping[str, Any] = field(default_factory=dict)


def log_issues(groups: Iterable[IssueGroup], among: str = "") -> None:
    """Log the issues found ``among`` some rows.

    Raises:
        DataError: some would spoil the run; all of these in one error.
    """
    stops = []
    for group in groups:
        hint = f"; {group.first[0].hint}" if group.first[0].hint else ""
        message = f"{group.count:,} {group.description}{among}, such as {group.first[0]}{hint}"
        if group.severity == "stops":
            stops.append(message)
        else:
            warn(message)
    if stops:
        raise DataError("; ".join(stops), "`lorakeet doctor` shows more, and its --fix mends what is certain")


def finish(
    report: PrepareReport,
    encoder: Encoder,
    labels: LabelSet | None,
    layout: Layout,
    samples: tuple[Any, datasets.Dataset | None],
    rows: tuple[datasets.Dataset | None, datasets.Dataset | None] = (None, None),
    usable: datasets.Dataset | None = None,
    locations: Locations | LocatedStream | None = None,
) -> Prepared:
    """Build the result, with only the columns that a model takes, and log the warnings of the report.

    Args:
        report: of the data.
        encoder: made the samples.
        labels: of the rows, if they have any.
        layout: of the rows.
        samples: training and held-out samples.
        rows: the rows of both.
        usable: all rows that samples were made of.
        locations: of the training samples.
    """
    for warning in report.warnings():
        warn(warning)
    columns = sample_columns(encoder)
    train, held_out = (part if part is None else part.select_columns(columns) for part in samples)
    names = labels.names if labels is not None and labels.names else None
    problem = labels.problem if labels else None
    answers = usable if "row" in columns else None
    chat = system_turn_notes(usable) if isinstance(encoder, ChatEncoder) else {}
    return Prepared(train, held_out, report, names, problem, layout, locations, *rows, answers, chat)


def sample_columns(encoder: Encoder) -> list[str]:
    """Return the columns that are kept of a sample: for the model, for decoding its answers, and the length."""
    answer = encoder.answer_columns()
    return [*encoder.model_columns(), *answer, *(["row"] if answer else []), "length"]


def check_length(longest: int, max_positions: int | None) -> None:
    """Refuse samples that are longer than the model takes."""
    if max_positions is not None and longest > max_positions:
        raise DataError(
            f"the longest sample has {longest:,} tokens, the model takes {max_positions:,}",
            f"cut longer ones: data.max_length={max_positions}",
        )


def count_columns(tokens: datasets.Dataset) -> dict[str, np.ndarray]:
    """Return the columns of counts of samples, each [samples]."""
    table = tokens.data if tokens._indices is None else tokens.flatten_indices().data
    return {name: table.column(name).to_numpy() for name in ("length", "targets", "lost", "cut", "ended", "row")}


def figures(part: str, counts: Mapping[str, np.ndarray], numbers: np.ndarray) -> dict[str, Any]:
    """Sum the figures of one part under the names of the report.

    Args:
        part: ``train`` or ``held_out``.
        counts: columns of counts, each [samples].
        numbers: of the samples of this part.
    """
    tokens, targets = (int(counts[name][numbers].sum()) for name in ("length", "targets"))
    return {f"{part}_samples": len(numbers), f"{part}_tokens": tokens, f"{part}_targets": targets}


def shape(counts: Mapping[str, np.ndarray], numbers: np.ndarray) -> dict[str, Any]:
    """Return the lengths of the samples ``numbers``, and how many are cut or end, under the names of the report."""
    lengths = counts["length"][numbers] if len(numbers) else np.zeros(1, np.int32)
    sums = {name: int(counts[name][numbers].sum()) for name in ("cut", "ended", "lost")}
    return {"median_length": float(np.median(lengths)), "longest": int(lengths.max()), **sums}


def id_columns(features: Iterable[str]) -> list[str]:
    """Return the columns that hold the texts of a sample."""
    return [name for name in features if name in ("input_ids", "positive_ids", "negative_ids")]


def digest(sample: Mapping[str, Sequence[int]]) -> bytes:
    """Hash the texts of a sample, given as token ids by column."""
    return hashlib.sha256(b"".join(b"%d:" % len(ids) + array("i", ids).tobytes() for ids in sample.values())).digest()


def nothing_learnable(sample: dict[str, Any], source: str, encoder: Encoder, task: TaskSettings) -> DataError:
    """Return the error for data none of whose samples has a target, with one sample decoded.

    Args:
        sample: one of them.
        source: name of the data.
        encoder: made it.
        task: to be trained.
    """
    lost, hint = ("; all targets were cut away", "raise data.max_length") if sample["lost"] else ("", None)
    shown = describe_sample(encoder.tokenizer, sample, task.type)
    return DataError(f"nothing to learn in {source}: no sample has a target{lost}; the first one is {shown}", hint)
