"""Samples for models that read or rewrite: classes, tags, pairs, translations, questions, gaps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import datasets

from lorakeet.chat_template import check_offsets
from lorakeet.data.encode.encoder import IDS, Batch, Encoder, Sample
from lorakeet.data.encode.text import with_end
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.ignore_index import IGNORE_INDEX

_OVERLAP = 6  # this part of a window's tokens is in the next window too


def _type_ids(tokenizer: Any) -> dict[str, Any]:
    """The column that tells a model which of two texts a token belongs to, where it wants to know."""
    return {"token_type_ids": IDS} if "token_type_ids" in tokenizer.model_input_names else {}


def _without(ids: Any, names: Sequence[str], number: int) -> Sample:
    return {name: ids[name][number] for name in names}


@dataclass(frozen=True)
class ClassEncoder(Encoder):
    """A text, or a pair of texts, and its label: int64; float32 [classes] for multi_label; float32 for regression."""

    names: LabelSet
    pairs: bool

    def model_columns(self) -> dict[str, Any]:
        fraction = datasets.Value("float32")
        kinds = {"multi_label": datasets.List(fraction), "regression": fraction}
        types = _type_ids(self.tokenizer) if self.pairs else {}
        return {
            **super().model_columns(),
            **types,
            "labels": kinds.get(self.names.problem or "", datasets.Value("int64")),
        }

    def settings(self) -> list[Any]:
        return [*super().settings(), self.names.names, self.names.problem, self.pairs]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        texts = [batch["text"], batch["text_pair"]] if self.pairs else [batch["text"]]
        encoded, cut = self.shortened(self.max_length, *texts)
        names = [name for name in self.model_columns() if name != "labels"]
        for number, label in enumerate(batch["label"]):
            try:
                target = self.names.target(label)
            except ValueError as error:
                yield number, {"fault": str(error)}
                continue
            sample = _without(encoded, names, number)
            length = len(sample["input_ids"])
            yield number, {**sample, "labels": target, "length": length, "targets": int(length > 0), "cut": cut[number]}


@dataclass(frozen=True)
class TagEncoder(Encoder):
    """Words and their tags: the first token of a word has its tag, every other -100.

    The words are joined by spaces and tokenised as one text, as a text is when the model is asked; which word a token
    belongs to, its place tells. What is beyond ``max_length`` is cut.
    """

    names: LabelSet

    def __post_init__(self) -> None:
        check_offsets(self.tokenizer)

    def model_columns(self) -> dict[str, Any]:
        return {**super().model_columns(), "labels": IDS}

    def settings(self) -> list[Any]:
        return [*super().settings(), self.names.names]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        texts = [" ".join(words) for words in batch["tokens"]]
        encoded, cut = self.shortened(self.max_length, texts, return_offsets_mapping=True)
        for number, (words, tags) in enumerate(zip(batch["tokens"], batch["tags"], strict=True)):
            try:
                numbers = [self.names.number(tag) for tag in tags]
            except ValueError as error:
                yield number, {"fault": str(error)}
                continue
            labels = word_labels(words, numbers, encoded["offset_mapping"][number])
            targets = sum(label != IGNORE_INDEX for label in labels)
            yield (
                number,
                {
                    "input_ids": encoded["input_ids"][number],
                    "labels": labels,
                    "length": len(labels),
                    "targets": targets,
                    "lost": len(words) - targets if cut[number] else 0,
                    "cut": cut[number],
                },
            )


def word_labels(words: Sequence[str], tags: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The label of each token of ``words`` joined by spaces: [tokens]."""
    starts = [0, *accumulate(len(word) + 1 for word in words)][:-1]  # of each word
    labels, tagged = [], -1  # the last word that has its label
    for start, end in offsets:
        word = -1
        if start < end:
            word = bisect_right(starts, start) - 1
            if start >= starts[word] + len(words[word]) and end > start + 1:  # the space before the next word
                word += 1
            elif start >= starts[word] + len(words[word]):
                word = -1
        labels.append(tags[word] if word > tagged else IGNORE_INDEX)
        tagged = max(tagged, word)
    return labels


@dataclass(frozen=True)
class TranslationEncoder(Encoder):
    """What is read, and as labels what is to be written, with an end token; each of at most ``max_length`` tokens."""

    def model_columns(self) -> dict[str, Any]:
        return {**super().model_columns(), "labels": IDS}

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        end = self.tokenizer.eos_token_id
        encoded, cut = self.shortened(self.max_length, batch["source"])
        written = self.tokenizer(text_target=batch["target"], padding=False, truncation=False, verbose=False)
        for number, target in enumerate(written["input_ids"]):
            ids, labels = encoded["input_ids"][number], with_end(target, end)
            kept = labels[: self.max_length]
            yield (
                number,
                {
                    "input_ids": ids,
                    "labels": kept,
                    "length": max(len(ids), len(kept)),
                    "targets": len(kept) if ids else 0,
                    "lost": len(labels) - len(kept),
                    "cut": cut[number] or len(kept) < len(labels),
                    "ended": end is not None and kept[-1:] == [end],
                },
            )


@dataclass(frozen=True)
class PairEncoder(Encoder):
    """Texts that belong together, and perhaps one that does not: ``input_ids``, ``positive_ids``, ``negative_ids``."""

    negatives: bool

    def model_columns(self) -> dict[str, Any]:
        return dict.fromkeys(self._parts(), IDS)

    def settings(self) -> list[Any]:
        return [*super().settings(), self.negatives]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        encoded = {name: self.shortened(self.max_length, batch[role]) for name, role in self._parts().items()}
        for number in range(len(batch["anchor"])):
            parts = {name: ids["input_ids"][number] for name, (ids, _) in encoded.items()}
            cut = any(cuts[number] for _, cuts in encoded.values())
            targets = int(all(parts.values()))
            yield number, {**parts, "length": max(map(len, parts.values())), "targets": targets, "cut": cut}

    def _parts(self) -> dict[str, str]:
        parts = {"input_ids": "anchor", "positive_ids": "positive"}
        return {**parts, "negative_ids": "negative"} if self.negatives else parts


@dataclass(frozen=True)
class MaskedEncoder(Encoder):
    """A text whose gaps are chosen anew each time; ``words`` numbers the words of whole-word masking, -1: no word."""

    whole_word: bool

    def __post_init__(self) -> None:
        if self.whole_word:
            check_offsets(self.tokenizer)

    def model_columns(self) -> dict[str, Any]:
        return {**super().model_columns(), **({"words": IDS} if self.whole_word else {})}

    def settings(self) -> list[Any]:
        return [*super().settings(), self.whole_word]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        encoded, cut = self.shortened(self.max_length, batch["text"], return_special_tokens_mask=True)
        for number, ids in enumerate(encoded["input_ids"]):
            targets = len(ids) - sum(encoded["special_tokens_mask"][number])
            sample = {"input_ids": ids, "length": len(ids), "targets": targets, "cut": cut[number]}
            if self.whole_word:
                sample["words"] = [-1 if word is None else word for word in encoded.word_ids(number)]
            yield number, sample


@dataclass(frozen=True)
class QuestionEncoder(Encoder):
    """A question and a window of its text, with the first and last token of the answer.

    A text that is too long gives several samples, whose windows overlap. Where a window does not hold the whole
    answer, or there is none, both positions are those of the first special token (CLS).
    """

    def __post_init__(self) -> None:
        check_offsets(self.tokenizer)

    def model_columns(self) -> dict[str, Any]:
        place = datasets.Value("int64")
        return {
            **super().model_columns(),
            **_type_ids(self.tokenizer),
            "start_positions": place,
            "end_positions": place,
        }

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        questions, cut = self._short_questions(batch["question"])
        encoded = self.tokenizer(
            questions,
            batch["context"],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.max_length // _OVERLAP,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,
            verbose=False,
        )
        names = ["input_ids", *_type_ids(self.tokenizer)]
        for window, number in enumerate(encoded["overflow_to_sample_mapping"]):
            try:
                answer = answer_span(batch["context"][number], batch["answers"][number], batch["answer_start"][number])
            except ValueError as error:
                yield number, {"fault": str(error)}
                continue
            sample = _without(encoded, names, window)
            start, end = self._positions(encoded, window, answer)
            length = len(sample["input_ids"])
            places = {"start_positions": start, "end_positions": end}
            yield number, {**sample, **places, "length": length, "targets": 1, "cut": cut[number]}

    def _short_questions(self, questions: Sequence[str]) -> tuple[list[str], list[bool]]:
        """Questions of at most half of ``max_length``, so that there is room for the text."""
        most = max(self.max_length // 2 - 4, 1)
        offsets = self.tokens(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut = [len(places) > most for places in offsets]
        ends = [places[most - 1][1] if is_cut else None for places, is_cut in zip(offsets, cut, strict=True)]
        return [question[:end] for question, end in zip(questions, ends, strict=True)], cut

    def _positions(self, encoded: Any, window: int, answer: tuple[int, int] | None) -> tuple[int, int]:
        """First and last token of the answer in this window, or twice the place that stands for "no answer"."""
        ids = encoded["input_ids"][window]
        cls = self.tokenizer.cls_token_id
        nowhere = ids.index(cls) if cls in ids else 0
        if answer is None:
            return nowhere, nowhere
        first, last = answer
        parts, offsets = encoded.sequence_ids(window), encoded["offset_mapping"][window]
        inside = [
            place
            for place, (part, (start, end)) in enumerate(zip(parts, offsets, strict=True))
            if part == 1 and start < last and end > first
        ]
        if not inside or offsets[inside[0]][0] > first or offsets[inside[-1]][1] < last:
            return nowhere, nowhere
        return inside[0], inside[-1]


def answer_span(context: str, answers: Sequence[str], starts: Sequence[int]) -> tuple[int, int] | None:
    """First character of the first answer and the one after its last, without white space around; None: no answer.

    Raises:
        ValueError: the answer does not stand where it is said to.
    """
    if not answers:
        return None
    answer, start = answers[0], starts[0]
    if start < 0 or context[start : start + len(answer)] != answer:
        raise ValueError(f"the answer {answer!r:.40} does not stand at character {start} of its context")
    inner = answer.strip()
    if not inner:
        return None
    start += len(answer) - len(answer.lstrip())
    return start, start + len(inner)
