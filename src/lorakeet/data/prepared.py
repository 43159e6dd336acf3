"""Prepared samples, and the steps that preparing at once and preparing a stream share."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import datasets

from lorakeet.config import TaskSettings
from lorakeet.data.doctor.issues import Finding
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.render import describe_sample
from lorakeet.data.prepare_report import PrepareReport
from lorakeet.data.rows.kinds import Layout
from lorakeet.data.rows.label_set import LabelSet, Problem
from lorakeet.errors import DataError
from lorakeet.log import warn


@dataclass(frozen=True)
class Prepared:
    """Samples with what the model takes and ``length``, unpadded, in the order of the data.

    Attributes:
        train: samples; of a stream they are made while they are read.
        held_out: samples, None where nothing is to be held out.
        report: what became of the rows.
        labels: names of the classes or tags by their number; None where there are none.
        problem: kind of a SEQ_CLS, else None.
        layout: kind of the rows, and which column of the source plays which part.
        train_rows, held_out_rows: the rows that the samples were made of, in canonical columns (None for a stream).
    """

    train: datasets.Dataset | datasets.IterableDataset
    held_out: datasets.Dataset | None
    report: PrepareReport
    labels: tuple[str, ...] | None
    problem: Problem | None
    layout: Layout
    train_rows: datasets.Dataset | None = None
    held_out_rows: datasets.Dataset | None = None


def tell(findings: Iterable[Finding], among: str = "") -> None:
    """Say what the doctor has found ``among`` some rows.

    Raises:
        DataError: some of it would spoil the run; all of that in one error.
    """
    stops = []
    for finding in findings:
        said = f"{finding.count:,} {finding.what}{among}, such as {finding.first[0]}"
        if finding.severity == "stops":
            stops.append(said)
        else:
            warn(said)
    if stops:
        raise DataError("; ".join(stops), "`lorakeet doctor` shows more, and its --fix mends what is certain")


def finished(
    report: PrepareReport,
    encoder: Encoder,
    labels: LabelSet | None,
    layout: Layout,
    samples: tuple[Any, datasets.Dataset | None],
    rows: tuple[datasets.Dataset | None, datasets.Dataset | None] = (None, None),
) -> Prepared:
    """What is prepared, with only what a model takes; the report's warnings are said."""
    for problem in report.warnings():
        warn(problem)
    columns = [*encoder.model_columns(), "length"]
    train, held_out = (part if part is None else part.select_columns(columns) for part in samples)
    names = labels.names if labels is not None and labels.names else None
    return Prepared(train, held_out, report, names, labels.problem if labels else None, layout, *rows)


def check_length(longest: int, max_positions: int | None) -> None:
    """Refuse samples that are longer than the model takes."""
    if max_positions is not None and longest > max_positions:
        raise DataError(
            f"the longest sample has {longest:,} tokens, the model takes {max_positions:,}",
            f"cut longer ones: data.max_length={max_positions}",
        )


def figures(part: str, tokens: datasets.Dataset) -> dict[str, Any]:
    """Samples, tokens and targets of a part, as the report names them."""
    totals = {
        f"{part}_{name}": sum(tokens[column][:]) for name, column in (("tokens", "length"), ("targets", "targets"))
    }
    return {f"{part}_samples": len(tokens), **totals}


def shape(tokens: datasets.Dataset) -> dict[str, Any]:
    """Lengths of samples, and how many are cut and how many end, as the report names them."""
    lengths = tokens["length"][:] or [0]
    counts = {name: sum(tokens[name][:]) for name in ("cut", "ended", "lost")}
    return {"median_length": float(median(lengths)), "longest": max(lengths), **counts}


def id_columns(features: Iterable[str]) -> list[str]:
    """The columns that hold a sample's texts."""
    return [name for name in features if name in ("input_ids", "positive_ids", "negative_ids")]


def digest(sample: Mapping[str, Sequence[int]]) -> bytes:
    """A hash of the texts of a sample, as ids by column."""
    return hashlib.sha256(b"".join(b"%d:" % len(ids) + array("i", ids).tobytes() for ids in sample.values())).digest()


def nothing_learnable(sample: dict[str, Any], source: str, encoder: Encoder, task: TaskSettings) -> DataError:
    """The error for data whose every sample has no target, with one of them decoded."""
    lost, hint = ("; all that is learned was cut away", "raise data.max_length") if sample["lost"] else ("", None)
    shown = describe_sample(encoder.tokenizer, sample, task.type)
    return DataError(f"nothing to learn in {source}: no sample has a target{lost}; the first one is {shown}", hint)
