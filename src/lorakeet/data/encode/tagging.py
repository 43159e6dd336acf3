"""Encoder of words with tags."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lorakeet.chat.turns import check_offsets
from lorakeet.data.encode.encoder import Batch, Encoder, Sample, ids_type
from lorakeet.data.read.record import Fault
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.ignore_index import IGNORE_INDEX


@dataclass(frozen=True)
class TaggingEncoder(Encoder):
    """Words and their tags: the first token of a word has its tag, every other -100.

    The words are joined by spaces and tokenized as one text, as prediction does. The offset of a token tells its word.
    Words beyond ``max_length`` tokens are cut.

    Attributes:
        names: the tags; None: the rows have none, and the label of a word is its number.
    """

    names: LabelSet | None

    def __post_init__(self) -> None:
        check_offsets(self.tokenizer)

    def model_columns(self) -> dict[str, Any]:
        return {**super().model_columns(), "labels": ids_type()}

    def settings(self) -> list[Any]:
        return [*super().settings(), *(() if self.names is None else self.names.names)]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        encodings = self.shortened([" ".join(words) for words in batch["tokens"]], return_offsets_mapping=True)
        for number, words in enumerate(batch["tokens"]):
            try:
                tags = range(len(words)) if self.names is None else map(self.names.number, batch["tags"][number])
                numbers = list(tags)
            except ValueError as error:
                yield number, Fault("label_unknown", str(error))
                continue
            counts = encodings[number].counts()
            labels = word_labels(words, numbers, encodings[number].column("offset_mapping"))
            targets = sum(label != IGNORE_INDEX for label in labels)
            lost = len(words) - targets if counts["cut"] else 0
            ids = encodings[number].column("input_ids")
            yield number, {**counts, "input_ids": ids, "labels": labels, "targets": targets, "lost": lost}


def word_labels(words: Sequence[str], tags: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the label of each token of ``words`` joined by spaces: [tokens]."""
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
