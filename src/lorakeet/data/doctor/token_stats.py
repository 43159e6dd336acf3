"""Figures of the samples that a run would make: lengths, cuts, targets, and words that the base does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.config import DataSettings, TaskName, TaskSettings
from lorakeet.data.doctor.checks import special_tokens_in
from lorakeet.data.doctor.diagnosis import Shown
from lorakeet.data.doctor.issues import Issues
from lorakeet.data.doctor.length_histogram import Lengths
from lorakeet.data.encode.encoder import Encoder, Sample
from lorakeet.data.encode.kinds import make_encoder
from lorakeet.data.encode.render import describe_sample
from lorakeet.data.read.column_types import FLOAT, STR
from lorakeet.data.read.record import Fault, Location
from lorakeet.data.rows.kinds import Layout, find_kind
from lorakeet.data.rows.label_set import LabelSet, Problem
from lorakeet.facts.limits import Limits

#: Rows encoded together.
_BATCH = 512
_BYTE = re.compile(r"<0x[89A-F][0-9A-F]>")
#: Columns of a sample that hold token ids of texts.
_TEXTS = ("input_ids", "positive_ids", "negative_ids")


class TokenStats:
    """Counts of the samples that the encoder of the run makes from usable rows. Without a tokenizer, only characters.

    Args:
        settings: longest sample, and which parts of a row are in the loss.
        task: its type may still be ``auto``; :meth:`begin` says it.
        tokenizer: of the base model, or None.
        found: where problems are added.
        samples: decoded samples to keep.
        limits: of the base model, or None.

    Attributes:
        lengths: of whole samples, before they are cut.
        tokens, targets, unknown: of the samples as a run takes them: cut, and without those that have no target.
        samples: the first few, decoded.
    """

    def __init__(
        self,
        settings: DataSettings,
        task: TaskSettings,
        tokenizer: Any,
        found: Issues,
        samples: int,
        limits: Limits | None = None,
    ) -> None:
        self._settings, self._task, self._tokenizer = settings, task, tokenizer
        self._limits = limits or Limits()
        self._found, self._wanted = found, samples
        self.lengths = Lengths("characters" if tokenizer is None else "tokens")
        self.tokens = self.targets = self.unknown = 0
        self.samples: list[Shown] = []
        self._waiting: list[tuple[Location, Mapping[str, Any]]] = []
        self._encoder: Encoder | None = None
        self._labels: OpenLabelSet | None = None
        self._bytes = byte_tokens(tokenizer) if tokenizer is not None else frozenset()
        special = getattr(tokenizer, "all_special_tokens", None) or ()
        self._special = [token for token in special if token not in (getattr(tokenizer, "mask_token", None), "")]

    def begin(self, layout: Layout, task: TaskName) -> None:
        """Set the ``layout`` of the rows that follow, and their concrete ``task``."""
        self.finish()
        if self._tokenizer is not None:
            self._task = self._task.model_copy(update={"type": task})
            self._labels = OpenLabelSet.of(layout, self._task)
            rows = self._limits.rows
            self._encoder = make_encoder(layout, self._task, self._settings, self._tokenizer, self._labels, rows)

    def add(self, location: Location, values: Mapping[str, Any], texts: Sequence[str]) -> None:
        """Count a usable canonical row and its ``texts``."""
        if self._encoder is None:
            self.lengths.add(sum(map(len, texts)))
            return
        if special := special_tokens_in(texts, self._special):
            self._found.add("special_token", location, special)
        self._waiting.append((location, values))
        if len(self._waiting) >= _BATCH:
            self.finish()

    def finish(self) -> None:
        """Encode and count the rows that wait for their batch to fill."""
        waiting, self._waiting = self._waiting, []
        if not waiting or self._encoder is None:
            return
        batch = {name: [values[name] for _, values in waiting] for name in waiting[0][1]}
        for at, sample in self._encoder.samples(batch):
            location, _ = waiting[at]
            sample = self._encoder.readable(sample)
            if isinstance(sample, Fault):
                self._found.add(sample.code, location, sample.message.partition("\n")[0], sample.hint)
            else:
                self._count(location, sample)

    def _count(self, location: Location, sample: Sample) -> None:
        length, targets, lost = sample["length"], sample["targets"], sample.get("lost", 0)
        whole = int(sample.get("whole") or length)
        if not targets:
            why = f": all {lost:,} targets are cut away" if lost else ""
            self._found.add("nothing_learned", location, f"no target in {length:,} tokens{why}")
            return
        if length > (self._limits.tokens or length):
            self._found.add("too_long", location, f"{length:,} tokens, the model takes {self._limits.tokens:,}")
        self.lengths.add(whole)
        self.tokens += length
        self.targets += targets
        if sample["cut"]:
            before = f"{whole:,} tokens, " if whole > length else ""  # of a question, only the first half is cut
            self._found.add("long", location, f"{before}cut to {self._settings.max_length:,}")
        if lost:
            self._found.add("truncated", location, f"{lost:,} of {lost + targets:,} targets are cut away")
        self._count_unknown(location, sample)
        if len(self.samples) < self._wanted:
            self.samples.append(self._shown(str(location), sample))

    def _count_unknown(self, location: Location, sample: Sample) -> None:
        ids = [token for name in _TEXTS for token in sample.get(name, ())]
        unknown = ids.count(self._tokenizer.unk_token_id) if self._tokenizer.unk_token_id is not None else 0
        self.unknown += unknown
        if unknown:
            self._found.add("unknown_token", location, f"{unknown:,} of {len(ids):,} tokens are unknown")
        elif self._bytes and (spelt := sum(token in self._bytes for token in ids)):
            self._found.add("byte_token", location, f"{spelt:,} of {len(ids):,} tokens are single bytes")

    def _shown(self, place: str, sample: Sample) -> Shown:
        names = self._labels.found if self._labels is not None and self._labels.problem != "regression" else None
        plain, coloured = (
            describe_sample(self._tokenizer, sample, self._task.type, names, colour=colour) for colour in (False, True)
        )
        return Shown(place, plain, coloured)


@dataclass(frozen=True)
class OpenLabelSet(LabelSet):
    """Labels that are numbered as they appear: all of them are known only at the end of the data."""

    @classmethod
    def of(cls, layout: Layout, task: TaskSettings) -> OpenLabelSet | None:
        """Build the label set for rows of ``layout``; None for rows without labels."""
        column = find_kind(layout.kind).labels
        if column is None:
            return None
        type = layout.types.get(column, STR)
        found: Problem = "multi_label" if type.is_list else "regression" if type == FLOAT else "single_label"
        return cls((), None if task.type == "TOKEN_CLS" else found if task.problem == "auto" else task.problem)

    @property
    def found(self) -> list[str]:
        """Labels so far, by number."""
        return list(self._places)

    def number(self, label: Any) -> int:
        """Return the number of a label, a new one for a label not seen before."""
        name = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
        return self._places.setdefault(name, len(self._places))  # type: ignore[attr-defined]

    def target(self, label: Any) -> Any:
        """Return a label as the model takes it; for multi_label a list of 0.0 and 1.0 [labels so far]."""
        if self.problem != "multi_label":
            return super().target(label)
        marked = {self.number(one) for one in (label if isinstance(label, list) else [label])}
        return [float(number in marked) for number in range(len(self._places))]


def byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that stand for a single byte of a character without a token of its own.

    Their names are like ``<0xE2>``, or one sign of the alphabet in which GPT-2 writes bytes (Radford et al. 2019, 2.2).
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    spelt = {number for token, number in vocabulary.items() if _BYTE.fullmatch(token)}
    if "Ġ" in vocabulary or any(token.startswith("Ġ") for token in vocabulary):
        visible = {chr(byte) for byte in (*range(0xA1, 0xAD), *range(0xAE, 0x100))}
        others = {chr(0x100 + at) for at in range(68)}
        # 33 control bytes and the space come first, then 0x7f to 0xa0, and 0xad
        high = visible | (others - {chr(0x100 + at) for at in range(34)})
        spelt |= {number for token, number in vocabulary.items() if len(token) == 1 and token in high}
    return frozenset(spelt)
