"""Samples and the base class of the encoders that make them from rows.

Columns of a sample:

| column      | contents                                                                                       |
|-------------|------------------------------------------------------------------------------------------------|
| `input_ids` | int32 [length]                                                                                 |
| `labels`    | targets, where they are not `input_ids` itself; for a causal model int32 [length], -100 outside |
|             | the loss; otherwise as the task defines them                                                   |
| `length`    | tokens, of the longest part where there are several                                            |
| `targets`   | tokens in the loss (labels, for a task without target tokens); 0: the sample is left out       |
| `lost`      | targets that were cut away                                                                     |
| `cut`       | whether the sample was cut to ``max_length``                                                   |
| `ended`     | whether its end token is in the loss                                                           |
| `row`       | number of the row that the sample was made from                                                |

Further inputs of the model, such as `token_type_ids`, have columns of their own, and so has what decodes its answers
(:meth:`Encoder.answer_columns`).

Rows that are only asked about lack the columns of answers. They give the same samples, without `labels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets

from lorakeet.data.read.record import Fault, Location
from lorakeet.errors import DataError
from lorakeet.facts.special_tokens import added_tokens, kept_positions, once, text_ids, trimmed
from lorakeet.facts.vocabulary import NO_ROW_HINT, no_row
from lorakeet.ignore_index import IGNORE_INDEX

Batch = Mapping[str, list[Any]]
Sample = dict[str, Any]

#: Rows that cannot be samples and are written out in an error; further ones are counted.
_SHOWN = 3
#: Types of the columns that count what a sample has.
_COUNTS = {"length": "int32", "targets": "int32", "lost": "int32", "cut": "bool", "ended": "bool"}
_DEFAULTS: Sample = {"lost": 0, "cut": False, "ended": False}


def ids_type() -> datasets.List:
    """Return the type of a column of token ids: int32 [length]."""
    return datasets.List(datasets.Value("int32"))


class Encoded(NamedTuple):
    """Samples of a batch, and the rows of it that cannot be samples.

    Attributes:
        columns: the samples by column.
        faults: number of the row, and its fault.
    """

    columns: dict[str, list[Any]]
    faults: list[tuple[int, Fault]]


class Shortened(NamedTuple):
    """Encoded text, or pair of texts, of at most ``max_length`` tokens.

    Attributes:
        batch: the output of the tokenizer in which it stands.
        at: its index there.
        kept: positions of its tokens there, without special tokens that the text repeats.
        whole: tokens before it was cut.
    """

    batch: Any
    at: int
    kept: Sequence[int]
    whole: int

    def column(self, name: str) -> list[Any]:
        """Return one column of the tokenizer's output, such as ``input_ids`` [length]."""
        return self.take(self.batch[name][self.at])

    def take(self, values: Sequence[Any]) -> list[Any]:
        """Return those of the values, one for each token of the tokenizer's output, that belong to the sample."""
        return list(values) if len(self.kept) == len(values) else [values[at] for at in self.kept]

    def counts(self) -> Sample:
        """Return the columns ``length`` and ``cut``, and the length of the whole."""
        return {"length": len(self.kept), "whole": self.whole, "cut": len(self.kept) < self.whole}


@dataclass(frozen=True)
class Encoder:
    """Makes samples from batches of canonical rows. Subclasses name the columns and fill them.

    Attributes:
        tokenizer: of ``transformers``.
        max_length: tokens of the longest sample.
        vocabulary: rows of the model's embedding, fewer than the tokenizer's tokens; None: enough for all of them.
    """

    tokenizer: Any
    max_length: int
    vocabulary: int | None = field(default=None, kw_only=True)

    def __call__(self, batch: Batch, rows: Sequence[int]) -> Encoded:
        """Encode a batch of rows.

        Args:
            batch: canonical columns, equally long.
            rows: number of each row in the data set.
        """
        samples: list[Sample] = []
        faults: list[tuple[int, Fault]] = []
        for at, sample in self.samples(batch):
            sample = self.readable(sample)
            if isinstance(sample, Fault):
                faults.append((rows[at], sample))
            else:
                samples.append({**_DEFAULTS, **sample, "row": rows[at]})
        return Encoded({name: [sample[name] for sample in samples] for name in self.features()}, faults)

    def readable(self, sample: Sample | Fault) -> Sample | Fault:
        """Return the sample, or a fault where the model has no row for one of its tokens."""
        if self.vocabulary is None or isinstance(sample, Fault):
            return sample
        columns = (values for name, values in sample.items() if name.endswith("_ids") or name == "labels")
        highest = max((max(ids, default=-1) for ids in columns if isinstance(ids, list)), default=-1)
        if highest < self.vocabulary:
            return sample
        return Fault("no_row", no_row(int(highest), self.tokenizer, self.vocabulary), NO_ROW_HINT)

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        """Yield the number of a row within the batch, and a sample of it or its fault; a row may give several samples.

        Besides its columns, a sample may have ``whole``: the tokens before it was cut, where that is not ``length``.
        """
        raise NotImplementedError

    def model_columns(self) -> dict[str, Any]:
        """Return the columns that the model takes, with their types."""
        return {"input_ids": ids_type()}

    def answer_columns(self) -> dict[str, Any]:
        """Return the columns that no model takes and that its answers are decoded with, with their types."""
        return {}

    def features(self) -> datasets.Features:
        """Return all columns of a sample with their types."""
        counts = {name: datasets.Value(kind) for name, kind in _COUNTS.items()}
        number = {"row": datasets.Value("int64")}
        return datasets.Features({**self.model_columns(), **self.answer_columns(), **counts, **number})

    def settings(self) -> list[Any]:
        """Return the settings that shape the samples, besides the tokenizer's own: part of the name of a cache."""
        return [type(self).__name__, self.max_length, self.vocabulary]

    def tokens(self, texts: Sequence[str], **options: Any) -> Any:
        """Tokenize texts without cutting them, and without the tokenizer's warning about their length."""
        options = {"return_attention_mask": False, "return_token_type_ids": False, **options}
        return self.tokenizer(list(texts), padding=False, truncation=False, verbose=False, **options)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts with special tokens, without offsets where the tokenizer can leave them out.

        ``transformers`` always asks its back end for offsets, which cost a quarter of the time. So only the first text
        goes through it, which also sets the options of the back end. A tokenizer of its own behavior gets all texts.
        """
        if not _is_plain(self.tokenizer):
            return text_ids(self.tokenizer, texts)
        self.tokens(texts[:1])
        around = added_tokens(self.tokenizer)
        given = [trimmed(self.tokenizer, text) for text in texts]
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(given)
        return [once(encoding.ids, *around) for encoding in encodings]

    def shortened(self, *texts: Sequence[Any], **options: Any) -> list[Shortened]:
        """Tokenize texts, or pairs of them, and cut them to ``max_length`` tokens; special tokens are kept.

        Only texts that are too long are tokenized twice.
        """
        options = {"padding": False, "verbose": False, "return_attention_mask": False, **options}
        options |= {"return_special_tokens_mask": True}
        whole = self.tokenizer(*map(list, texts), truncation=False, **options)
        kept = [_kept(whole, at) for at in range(len(whole["input_ids"]))]
        made = [Shortened(whole, at, positions, len(positions)) for at, positions in enumerate(kept)]
        long = [at for at, encoding in enumerate(made) if encoding.whole > self.max_length]
        if long:
            some = [[text[at] for at in long] for text in texts]
            cut = self.tokenizer(*some, truncation=True, max_length=self.max_length, **options)
            for number, at in enumerate(long):
                made[at] = Shortened(cut, number, _kept(cut, number), made[at].whole)
        return made


def _kept(batch: Any, at: int) -> Sequence[int]:
    """Return the positions of a text in a tokenizer's output at which it does not repeat a special token."""
    return kept_positions(batch["input_ids"][at], batch["special_tokens_mask"][at])


def _is_plain(tokenizer: Any) -> bool:
    """Whether ``tokenizer`` gives texts to its back end as they are: no class of its own changes how it is called."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    own = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and own.__call__ is PreTrainedTokenizerBase.__call__
        and own._encode_plus is PreTrainedTokenizerFast._encode_plus
    )


@dataclass(frozen=True)
class CausalEncoder(Encoder):
    """Samples of a causal model: token ids, and which of them are in the loss.

    Attributes:
        learn_all: every token is in the loss, and there are no labels.
    """

    learn_all: bool

    def model_columns(self) -> dict[str, Any]:
        return super().model_columns() | ({} if self.learn_all else {"labels": ids_type()})

    def settings(self) -> list[Any]:
        return [*super().settings(), self.learn_all, self.tokenizer.eos_token_id]

    def sample(self, ids: list[int], in_loss: Sequence[bool] = ()) -> Sample:
        """Build a sample, cut to ``max_length``. The first token is never a target: nothing precedes it.

        Args:
            ids: token ids, whole.
            in_loss: whether each of them is in the loss; unused with ``learn_all``.
        """
        most, whole = self.max_length, len(ids)
        kept = ids[:most] if whole > most else ids
        wanted = max(whole - 1, 0) if self.learn_all else sum(in_loss[1:])
        targets = max(len(kept) - 1, 0) if self.learn_all else sum(in_loss[1:most])
        sample = {
            "input_ids": kept,
            "length": len(kept),
            "whole": whole,
            "targets": targets,
            "lost": wanted - targets,
            "cut": whole > most,
        }
        if not self.learn_all:
            sample["labels"] = [
                token if flag else IGNORE_INDEX for token, flag in zip(kept, in_loss[:most], strict=True)
            ]
        return sample


def with_end(ids: Sequence[int], end: int | None) -> list[int]:
    """Append the end token to ``ids``, unless they end with it already or there is none."""
    return [*ids] if end is None or (len(ids) and ids[-1] == end) else [*ids, end]


def cannot_encode(faults: Sequence[tuple[Location | str, Fault]], source: str) -> DataError:
    """Return one error for all rows that cannot be samples, given by location and fault."""
    more = f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
    shown = "; ".join(f"{location}: {fault.message}" for location, fault in faults[:_SHOWN])
    hint = next((fault.hint for _, fault in faults if fault.hint), None)
    return DataError(f"{len(faults):,} row{'s' * (len(faults) > 1)} of {source} cannot be learned: {shown}{more}", hint)
