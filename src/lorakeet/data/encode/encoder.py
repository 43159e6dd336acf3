"""What a sample is, and what all encoders of rows have in common.

Every sample has

| column      | holds                                                                                          |
|-------------|------------------------------------------------------------------------------------------------|
| `input_ids` | int32 [length]                                                                                 |
| `labels`    | what is learned, where it is not `input_ids` itself: for a causal model int32 [length], -100    |
|             | where nothing is learned; else as the task has it                                              |
| `length`    | tokens, of the longest part where there are several                                            |
| `targets`   | learned tokens (labels, where a task has no tokens to learn); 0: nothing can be learned        |
| `lost`      | learned tokens that were cut away                                                              |
| `cut`       | whether it was cut to ``max_length``                                                           |
| `ended`     | whether its end token is learned                                                               |
| `fault`     | why the row cannot be a sample at all; null as a rule                                          |
| `row`       | number of the row that it was made of                                                          |

and what the model takes besides, such as `token_type_ids`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from lorakeet.ignore_index import IGNORE_INDEX

Batch = Mapping[str, list[Any]]
Sample = dict[str, Any]

IDS = datasets.List(datasets.Value("int32"))
_FLAGS = {
    "length": datasets.Value("int32"),
    "targets": datasets.Value("int32"),
    "lost": datasets.Value("int32"),
    "cut": datasets.Value("bool"),
    "ended": datasets.Value("bool"),
    "fault": datasets.Value("string"),
    "row": datasets.Value("int64"),
}
_EMPTY: Sample = {"length": 0, "targets": 0, "lost": 0, "cut": False, "ended": False, "fault": None}


@dataclass(frozen=True)
class Encoder:
    """Turns a batch of canonical rows into samples. Subclasses say which columns these have, and make them.

    Attributes:
        tokenizer: of ``transformers``.
        max_length: tokens of the longest sample.
    """

    tokenizer: Any
    max_length: int

    def __call__(self, batch: Batch, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The samples of a batch by column; ``rows``: the number of each row."""
        features = self.features()
        blank: dict[str, Any] = {
            name: [] if isinstance(kind, datasets.List) else 0 for name, kind in self.model_columns().items()
        }
        samples = [{**blank, **_EMPTY, **sample, "row": rows[at]} for at, sample in self.samples(batch)]
        return {name: [sample[name] for sample in samples] for name in features}

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        """Number of the row within the batch, and a sample of it; a row may give several."""
        raise NotImplementedError

    def model_columns(self) -> dict[str, Any]:
        """The columns that the model takes, with their types."""
        return {"input_ids": IDS}

    def features(self) -> datasets.Features:
        """All columns of a sample with their types."""
        return datasets.Features({**self.model_columns(), **_FLAGS})

    def settings(self) -> list[Any]:
        """What the samples depend on besides the rows and the tokenizer's own rules, for the name of a cache."""
        return [type(self).__name__, self.max_length]

    def tokens(self, texts: Sequence[str], **options: Any) -> Any:
        """Ids of whole texts, never cut; the tokenizer's word on their length is not wanted."""
        return self.tokenizer(list(texts), padding=False, truncation=False, verbose=False, **options)

    def shortened(self, length: int, *texts: Sequence[Any], **options: Any) -> Any:
        """Encoded texts (or pairs of them) of at most ``length`` tokens, special tokens kept; and which were cut."""
        settings = {"padding": False, "verbose": False, **options}
        encoded = self.tokenizer(*texts, truncation=True, max_length=length, **settings)
        full = [number for number, ids in enumerate(encoded["input_ids"]) if len(ids) >= length]
        cut = [False] * len(encoded["input_ids"])
        if full:  # exactly as long, or cut?
            some = [[text[number] for number in full] for text in texts]
            whole = self.tokenizer(*some, truncation=False, **settings)["input_ids"]
            for number, ids in zip(full, whole, strict=True):
                cut[number] = len(ids) > length
        return encoded, cut


@dataclass(frozen=True)
class CausalEncoder(Encoder):
    """Samples of a model that writes: ids, and which of them are learned.

    Attributes:
        learn_all: every token is learned, and there are no labels.
    """

    learn_all: bool

    def model_columns(self) -> dict[str, Any]:
        return super().model_columns() | ({} if self.learn_all else {"labels": IDS})

    def settings(self) -> list[Any]:
        return [*super().settings(), self.learn_all, self.tokenizer.eos_token_id]

    def sample(self, ids: Sequence[int], learned: Sequence[bool]) -> Sample:
        """A sample cut to ``max_length``; the first token is never a target, since nothing stands before it."""
        most = self.max_length
        learned = [True] * len(ids) if self.learn_all else learned
        targets = sum(learned[1:most])
        sample = {
            "input_ids": list(ids[:most]),
            "length": len(ids[:most]),
            "targets": targets,
            "lost": sum(learned[1:]) - targets,
            "cut": len(ids) > most,
        }
        if self.learn_all:
            return sample
        labels = [token if flag else IGNORE_INDEX for token, flag in zip(ids, learned, strict=True)]
        return {**sample, "labels": labels[:most]}
