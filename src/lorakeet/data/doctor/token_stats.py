"""Samples measured as a run would make them: lengths, what is cut, what is learned, which words the base does not know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorakeet.config import DataSettings, TaskName, TaskSettings
from lorakeet.data.doctor.checks import special_tokens_in
from lorakeet.data.doctor.diagnosis import Shown
from lorakeet.data.doctor.issues import Findings
from lorakeet.data.doctor.length_histogram import Lengths
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.make import make_encoder
from lorakeet.data.encode.render import describe_sample, show_sample
from lorakeet.data.rows.kinds import Layout, find_kind
from lorakeet.ignore_index import IGNORE_INDEX

_BATCH = 512  # rows encoded together
_WHOLE = 1 << 30  # tokens: nothing is cut before it has been measured
_BYTE = re.compile(r"<0x[89A-F][0-9A-F]>")
_WRITTEN = ("text", "completion", "messages", "translation")


class Measure:
    """Takes usable rows one by one; without a tokenizer lengths are characters, and nothing is told of tokens.

    Attributes:
        lengths: of whole samples.
        tokens, targets, unknown: of the samples as they would be learned.
        samples: the first few, decoded.
    """

    def __init__(
        self, settings: DataSettings, task: TaskSettings, tokenizer: Any, found: Findings, samples: int
    ) -> None:
        self._settings, self._task, self._tokenizer, self._found, self._wanted = (
            settings,
            task,
            tokenizer,
            found,
            samples,
        )
        self.lengths = Lengths("characters" if tokenizer is None else "tokens")
        self.tokens = self.targets = self.unknown = 0
        self.samples: list[Shown] = []
        self._waiting: list[tuple[str, int, Mapping[str, Any]]] = []
        self._encoder: Encoder | None = None
        self._kind = "text"
        self._spelt = byte_tokens(tokenizer) if tokenizer is not None else frozenset()
        special = getattr(tokenizer, "all_special_tokens", None) or ()
        self._special = [token for token in special if token not in (getattr(tokenizer, "mask_token", None), "")]

    def begin(self, layout: Layout, task: TaskName) -> None:
        """What follows is of this ``layout``."""
        self.finish()
        self._kind = layout.kind
        self._encoder = None
        self._name = task
        if self._tokenizer is not None and layout.kind in _WRITTEN and task != "MASKED_LM":
            whole = self._settings.model_copy(update={"max_length": _WHOLE})
            self._encoder = make_encoder(layout, self._task.model_copy(update={"type": task}), whole, self._tokenizer)

    def add(self, source: str, place: int, values: Mapping[str, Any]) -> None:
        """Take a usable canonical row."""
        if self._tokenizer is None:
            self.lengths.add(sum(map(len, find_kind(self._kind).texts_of(values))))
            return
        if special := special_tokens_in(find_kind(self._kind).texts_of(values), self._special):
            self._found.add("special_token", source, place, special)
        self._waiting.append((source, place, values))
        if len(self._waiting) >= _BATCH:
            self.finish()

    def finish(self) -> None:
        """Measure what waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        batch = {name: [values[name] for _, _, values in waiting] for name in waiting[0][2]}
        measured = self._written(batch) if self._encoder is not None else self._read(batch)
        for at, ids, labels, fault in measured:
            source, place, values = waiting[at]
            if fault is not None:
                self._found.add("template", source, place, fault.partition("\n")[0])
            else:
                self._take(source, place, values, ids, labels)

    def _written(self, batch: Mapping[str, list[Any]]) -> Iterator[tuple[int, Any, Any, str | None]]:
        """Of each row its tokens and targets, by the encoder of the run."""
        assert self._encoder is not None
        for at, sample in self._encoder.samples(batch):
            if fault := sample.get("fault"):
                yield at, None, None, fault
            else:
                yield at, sample["input_ids"], sample.get("labels", sample["input_ids"]), None

    def _read(self, batch: Mapping[str, list[Any]]) -> Iterator[tuple[int, Any, Any, str | None]]:
        """Tokens of rows that are read and judged: their targets are no tokens (tags are one for each word)."""
        if self._kind == "tags":
            encoded = self._tokenizer(batch["tokens"], is_split_into_words=True, verbose=False)
            for at, ids in enumerate(encoded["input_ids"]):
                words = encoded.word_ids(at)
                first = [
                    word is not None and word != before for word, before in zip(words, [None, *words], strict=False)
                ]
                yield at, ids, [0 if is_first else IGNORE_INDEX for is_first in first], None
            return
        pairs = {"question": ("question", "context"), "classes": ("text", "text_pair"), "pairs": ("anchor",)}
        names = [name for name in pairs.get(self._kind, ("text",)) if batch.get(name, [None])[0] is not None]
        for at, ids in enumerate(self._tokenizer(*(batch[name] for name in names), verbose=False)["input_ids"]):
            yield at, ids, None, None

    def _take(self, source: str, place: int, values: Mapping[str, Any], ids: Any, labels: Any) -> None:
        most, length = self._settings.max_length, len(ids)
        self.lengths.add(length)
        kept = ids[:most]
        self.tokens += len(kept)
        if length > most:
            self._found.add("long", source, place, f"{length:,} tokens, cut to {most:,}")
        self._learned(source, place, length, labels)
        unknown = kept.count(self._tokenizer.unk_token_id) if self._tokenizer.unk_token_id is not None else 0
        self.unknown += unknown
        if unknown:
            self._found.add("unknown_token", source, place, f"{unknown:,} of {len(kept):,} tokens are unknown")
        elif spelt := sum(token in self._spelt for token in kept):
            self._found.add("byte_token", source, place, f"{spelt:,} of {len(kept):,} tokens are single bytes")
        if len(self.samples) < self._wanted:
            self.samples.append(self._shown(f"{source}:{place}", values, kept, labels))

    def _learned(self, source: str, place: int, length: int, labels: Any) -> None:
        most = self._settings.max_length
        if labels is None:
            self.targets += 1
            return
        first = 1 if self._kind in ("text", "completion", "messages") else 0  # nothing stands before the first token
        wanted = sum(label != IGNORE_INDEX for label in labels[first:])
        targets = sum(label != IGNORE_INDEX for label in labels[first:most])
        self.targets += targets
        if not targets:
            self._found.add("nothing_learned", source, place, f"none of {min(length, most):,} tokens is learned")
        elif targets < wanted:
            self._found.add("truncated", source, place, f"{wanted - targets:,} of {wanted:,} targets are cut away")

    def _shown(self, place: str, values: Mapping[str, Any], ids: Any, labels: Any) -> Shown:
        labels = None if labels is None else labels[: self._settings.max_length]
        if self._kind in ("text", "completion", "messages") and self._encoder is not None:
            plain, coloured = (show_sample(self._tokenizer, ids, labels, colour=colour) for colour in (False, True))
        elif self._kind == "translation":
            sample = {"input_ids": ids, "labels": labels}
            plain, coloured = (
                describe_sample(self._tokenizer, sample, "SEQ_2_SEQ_LM", colour=colour) for colour in (False, True)
            )
        else:
            asked = {"classes": "label", "tags": "tags", "question": "answers", "pairs": "positive"}.get(self._kind)
            answer = f"\n→ {values[asked]}" if asked else ""
            plain = coloured = f"{self._tokenizer.decode(ids)}{answer}"
        return Shown(place, plain, coloured)


def byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that stand for a single byte of a character which has none of its own.

    They are named like ``<0xE2>``, or are one sign of the alphabet in which GPT-2 writes bytes (Radford et al. 2019, 2.2).
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    spelt = {number for token, number in vocabulary.items() if _BYTE.fullmatch(token)}
    if "Ġ" in vocabulary or any(token.startswith("Ġ") for token in vocabulary):
        visible = {chr(byte) for byte in (*range(0xA1, 0xAD), *range(0xAE, 0x100))}
        others = {
            chr(0x100 + at) for at in range(68)
        }  # 33 control bytes and the space come first, then 0x7f to 0xa0, 0xad
        high = visible | (others - {chr(0x100 + at) for at in range(34)})
        spelt |= {number for token, number in vocabulary.items() if len(token) == 1 and token in high}
    return frozenset(spelt)
