"""From settings to samples: read, check, split, tokenise, and say what will be learned before anything is learned."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import datasets

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.examine import check_rows
from lorakeet.data.doctor.issues import Finding
from lorakeet.data.encode.cache import tokenise
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.make import complaint, make_encoder
from lorakeet.data.encode.render import describe_sample
from lorakeet.data.prepare_report import Report
from lorakeet.data.rows.column_mapping import Layout
from lorakeet.data.rows.content import contents, rows_hash, usable
from lorakeet.data.rows.label_set import LabelSet, Problem, find_labels
from lorakeet.data.rows.load import read_rows
from lorakeet.data.rows.split import Split, split_texts
from lorakeet.errors import DataError
from lorakeet.log import warn

_LABELLED = ("classes", "tags")
_REPORTED = (
    "null",
    "empty",
    "duplicate",
    "near_duplicate",
    "lost_character",
    "imbalance",
)  # problems that the report counts; what stops a run is none of them


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
    report: Report
    labels: tuple[str, ...] | None
    problem: Problem | None
    layout: Layout
    train_rows: datasets.Dataset | None = None
    held_out_rows: datasets.Dataset | None = None


def prepare(
    settings: DataSettings, task: TaskSettings, tokenizer: Any, *, seed: int, max_positions: int | None = None
) -> Prepared:
    """Read ``settings.path`` and make samples of it with ``tokenizer`` (of ``transformers``).

    Args:
        settings: the data.
        task: what is learned from it; its type is concrete.
        tokenizer: its end token is put after every text that is not cut.
        seed: chooses the held-out rows.
        max_positions: the longest sample that the model takes, if it has a limit.

    Raises:
        DataError: no such data, broken data, no columns for the task, unknown labels, rows that cannot be samples, nothing
            to learn, or samples too long for the model.
        BaseModelError: the tokenizer cannot do what the task needs, such as render a conversation.
    """
    if settings.stream:
        from lorakeet.data.prepare_stream import prepare_stream

        return prepare_stream(settings, task, tokenizer, seed=seed, max_positions=max_positions)
    read = read_rows(settings, task.type, seed=seed)
    kind, source = read.layout.kind, read.description
    filled = usable(read.data, kind)
    if not filled:
        raise DataError(f"nothing to learn in {source}: all {len(read.data):,} rows are empty")
    rows = read.data.select(filled)
    labels = find_labels(rows, task, source) if kind in _LABELLED else None
    found = check_rows(rows, read.layout, task, settings=settings).findings
    tell(finding for finding in found if finding.kind not in _REPORTED)
    encoder = make_encoder(read.layout, task, settings, tokenizer, labels)
    content_hash = rows_hash(rows, kind)
    tokens = tokenise(rows, content_hash, encoder)
    tokens = tokens.select(_learnable(tokens, rows, source, encoder, task))
    check_length(max(tokens["length"][:]), max_positions)
    row_of = tokens["row"][:]  # for each sample its number in rows
    numbers = sorted(set(row_of))
    some = rows.select(numbers)
    texts = contents(some, kind)
    parts = split_texts(texts, settings.eval_fraction, seed, _classes(some, labels))
    parts, moved = _apart(tokens, _sides(parts, numbers, row_of), settings, source)
    train, held_out = tokens.select(parts.train), tokens.select(parts.held_out)
    train_rows, held_out_rows = (
        rows.select(sorted({row_of[sample] for sample in part})) for part in (parts.train, parts.held_out)
    )
    report = Report(
        source=source,
        kind=kind,
        task=task.type,
        rows=len(read.data),
        empty=len(read.data) - len(filled),
        unlearnable=len(rows) - len(numbers),
        distinct=parts.distinct,
        duplicates=len(numbers) - parts.distinct,
        moved=moved,
        **figures("train", train),
        **figures("held_out", held_out),
        **shape(tokens),
        max_length=settings.max_length,
        end_token=tokenizer.eos_token,
        damaged=sum("\ufffd" in text for text in texts),
        labels=labels.count(_labels_of(train_rows)) if labels and labels.names else None,
        streamed=False,
        content_hash=content_hash,
    )
    some_held_out = bool(parts.held_out)
    return finished(
        report,
        encoder,
        labels,
        read.layout,
        (train, held_out if some_held_out else None),
        (train_rows, held_out_rows if some_held_out else None),
    )


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
    report: Report,
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
    return DataError(f"nothing to learn in {source}: no sample has a target{lost}; the first one is\n{shown}", hint)


def _learnable(
    tokens: datasets.Dataset, rows: datasets.Dataset, source: str, encoder: Encoder, task: TaskSettings
) -> list[int]:
    """Numbers of the samples that have a target; all rows that cannot be samples are complained of."""
    if any(tokens["fault"][:]):
        pairs = zip(tokens["row"][:], tokens["fault"][:], strict=True)
        places = rows["place"][:]
        raise complaint(((places[row], fault) for row, fault in pairs if fault), source)
    kept = [number for number, targets in enumerate(tokens["targets"][:]) if targets]
    if not kept:
        raise nothing_learnable(tokens[0], source, encoder, task)
    return kept


def _labels_of(rows: datasets.Dataset) -> list[Any]:
    return list(rows["tags" if "tags" in rows.column_names else "label"][:])


def _classes(rows: datasets.Dataset, labels: LabelSet | None) -> list[list[str]] | None:
    if labels is None or not labels.names:
        return None
    return [labels.classes(label) for label in _labels_of(rows)]


def _sides(split: Split, numbers: Sequence[int], row_of: Sequence[int]) -> Split:
    """A split of the rows with these ``numbers`` as one of samples."""
    held_out = {numbers[place] for place in split.held_out}
    sides: tuple[list[int], list[int]] = [], []
    for sample, row in enumerate(row_of):
        sides[row in held_out].append(sample)
    return Split(*sides, split.distinct)


def _apart(tokens: datasets.Dataset, split: Split, settings: DataSettings, source: str) -> tuple[Split, int]:
    """The split with each held-out sample that equals a training sample moved to it (two long texts that begin alike
    and were cut), and how many were moved.

    Raises:
        DataError: no held-out sample is left.
    """
    cut = [number for number, is_cut in enumerate(tokens["cut"][:]) if is_cut]
    some = tokens.select(cut).select_columns(id_columns(tokens.features))
    digests = {number: digest(sample) for number, sample in zip(cut, some, strict=True)}
    held_out = digests.keys() & set(split.held_out)
    learned = {digests[number] for number in digests.keys() - held_out}
    moved = {number for number in held_out if digests[number] in learned}
    kept = [number for number in split.held_out if number not in moved]
    if moved and not kept:
        raise DataError(
            f"cut to {settings.max_length} tokens, each held-out sample of {source} equals a training sample",
            "raise data.max_length, or split the texts",
        )
    return Split(sorted([*split.train, *moved]), kept, split.distinct), len(moved)
