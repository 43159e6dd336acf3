"""Collators: samples of different lengths to one padded batch, for each task.

Padding is known by position, never by token id: where the padding token is also the end token, the end of each sample
is still in the loss. Random numbers come from torch's own generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from lorakeet.config import TaskSettings
from lorakeet.errors import BaseModelError, DataError
from lorakeet.ignore_index import IGNORE_INDEX

Samples = Sequence[Mapping[str, Any]]
Collator = Callable[[list[Any]], Any]

_DRAWS = 1000  # attempts to choose masked positions, until a batch has one


@dataclass(frozen=True)
class PaddingCollator:
    """Collator that pads on the right to the longest sample of a batch.

    Args:
        pad_token_id: any id of the vocabulary; it is not in the loss and no token attends to it.
    """

    pad_token_id: int

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each int64 [batch, longest].

        A sample has ``input_ids`` and may have ``labels`` of the same length (-100: not in the loss); without them, every
        token is its own label. Other columns are left out. A causal model shifts the labels itself.

        Raises:
            DataError: no samples, a sample without tokens, or labels of another length.
        """
        if not samples:
            raise DataError("a batch of no samples, expected at least one")
        rows = [_row(number, sample) for number, sample in enumerate(samples)]
        return {
            "input_ids": padded([ids for ids, _ in rows], self.pad_token_id),
            "attention_mask": padded([torch.ones_like(ids) for ids, _ in rows], 0),
            "labels": padded([labels for _, labels in rows], IGNORE_INDEX),
        }


@dataclass(frozen=True)
class PairsCollator:
    """Collator of texts that belong together: one block for each part, padded on the right to its longest text.

    A batch has ``input_ids`` and ``attention_mask`` of the anchors, ``positive_input_ids`` and ``positive_attention_mask``,
    and, where the samples have ``negative_ids``, the same of these: each int64 [batch, longest].
    """

    pad_token_id: int

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        if not samples:
            raise DataError("a batch of no samples, expected at least one")
        batch = {}
        for part in ("", "positive_", "negative_"):
            column = f"{part or 'input_'}ids"
            if column in samples[0]:
                texts = [torch.as_tensor(sample[column], dtype=torch.int64) for sample in samples]
                batch[f"{part}input_ids"] = padded(texts, self.pad_token_id)
                batch[f"{part}attention_mask"] = padded([torch.ones_like(ids) for ids in texts], 0)
        return batch


@dataclass(frozen=True)
class OnlyColumns:
    """Collator of ``transformers`` that gets only the columns that its model takes."""

    inner: Collator
    columns: tuple[str, ...]

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        wanted = [{name: sample[name] for name in self.columns if name in sample} for sample in samples]
        return dict(self.inner(wanted))


@dataclass(frozen=True)
class QuestionCollator:
    """Collator of windows, padded on the right whatever the tokenizer says: positions count from the left.

    A batch has ``input_ids``, ``attention_mask``, what else the model takes, and the columns that decode its answers
    (:meth:`lorakeet.data.encode.question.QuestionEncoder.answer_columns`).

    Args:
        tokenizer: has a padding token.
    """

    tokenizer: Any

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        filling = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "starts": -1,
            "ends": -1,
        }
        columns = {name: [sample[name] for sample in samples] for name in samples[0] if name != "length"}
        mask = [torch.ones(len(ids), dtype=torch.int64) for ids in columns["input_ids"]]
        batch = {"attention_mask": padded(mask, 0)}
        for name, values in columns.items():
            rows = [torch.as_tensor(value, dtype=torch.int64) for value in values]
            batch[name] = padded(rows, filling[name]) if name in filling else torch.stack(rows)
        return batch


@dataclass(frozen=True)
class MaskingCollator:
    """Collator of masked positions (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Of the chosen tokens 80 % become the mask, 10 % a random token, and 10 % stay. Choices are made anew until a batch has
    a masked position: without one it has no loss.

    Args:
        tokenizer: has a mask token.
        probability: share of the tokens, or of the words, that are chosen; special tokens never are.
        whole_word: choose words, with all of their tokens; samples then have ``words``, the number of each token's word.
    """

    tokenizer: Any
    probability: float
    whole_word: bool = False

    def __call__(self, samples: Samples) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` (-100 where not masked): int64 [batch, longest]."""
        texts = [torch.as_tensor(sample["input_ids"], dtype=torch.int64) for sample in samples]
        mask = padded([torch.ones_like(ids) for ids in texts], 0)
        choose = self._mask_words if self.whole_word else self._mask_tokens
        for _ in range(_DRAWS):
            ids, labels = choose(padded(texts, self.tokenizer.pad_token_id), samples)
            labels = labels.where(mask.bool(), IGNORE_INDEX)
            if labels.ne(IGNORE_INDEX).any():
                return {"input_ids": ids, "attention_mask": mask, "labels": labels}
        raise DataError("a batch has no token that could be guessed", "leave out texts of special tokens only")

    def _mask_tokens(self, ids: Tensor, _: Samples) -> tuple[Tensor, Tensor]:
        inner = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=self.probability)
        return inner.torch_mask_tokens(ids)

    def _mask_words(self, ids: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        words = padded([torch.as_tensor(sample["words"], dtype=torch.int64) for sample in samples], -1)
        chosen = torch.rand(len(words), max(int(words.max()), 0) + 1) < self.probability  # [batch, words]
        masked = chosen.gather(1, words.clamp(min=0)) & words.ge(0)
        labels = ids.where(masked, IGNORE_INDEX)
        dice = torch.rand(ids.shape)
        anything = torch.randint(len(self.tokenizer), ids.shape)
        ids = ids.where(~(masked & dice.lt(0.8)), self.tokenizer.mask_token_id)
        return ids.where(~(masked & dice.ge(0.9)), anything), labels


def make_collator(task: TaskSettings, tokenizer: Any, model: Any = None) -> Collator:
    """Make the collator of a concrete task: samples to the inputs of its model, as tensors on the CPU.

    Args:
        task: with a concrete ``type``.
        tokenizer: knows the padding token; where nothing but our own collators is needed, any token may pad.
        model: of SEQ_2_SEQ_LM; makes the decoder's input of the labels.

    Raises:
        BaseModelError: no token to pad with, or for MASKED_LM none that marks a gap.
    """
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right"  # positions count from the left: a text has the same ones alone and in a batch
    pad = tokenizer.pad_token_id
    if pad is None and task.type not in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        raise BaseModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no padding token and no end token",
            "use a model whose tokenizer has one",
        )
    if task.type == "MASKED_LM" and tokenizer.mask_token_id is None:
        raise BaseModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no mask token, so no token can be masked",
            "use an encoder such as BERT, or another task",
        )
    inputs = ("input_ids", "token_type_ids")
    makers: Mapping[str, Callable[[], Collator]] = {
        "CAUSAL_LM": lambda: PaddingCollator(pad or 0),
        "FEATURE_EXTRACTION": lambda: PairsCollator(pad or 0),
        "MASKED_LM": lambda: MaskingCollator(tokenizer, task.mlm_probability, task.whole_word),
        "SEQ_CLS": lambda: OnlyColumns(DataCollatorWithPadding(tokenizer), (*inputs, "labels")),
        "TOKEN_CLS": lambda: OnlyColumns(DataCollatorForTokenClassification(tokenizer), (*inputs, "labels")),
        "SEQ_2_SEQ_LM": lambda: OnlyColumns(DataCollatorForSeq2Seq(tokenizer, model), ("input_ids", "labels")),
        "QUESTION_ANS": lambda: QuestionCollator(tokenizer),
    }
    return makers[task.type]()


def padded(rows: Sequence[Tensor], filling: int) -> Tensor:
    """Return one tensor [rows, longest] of ``rows`` [length], padded on the right with ``filling``."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=filling)


def _row(number: int, sample: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    ids = torch.as_tensor(sample["input_ids"], dtype=torch.int64)  # [length]
    targets = sample.get("labels")
    labels = ids if targets is None else torch.as_tensor(targets, dtype=torch.int64)
    if not len(ids):
        raise DataError(f"sample {number} of a batch has no tokens", "remove empty samples")
    if labels.shape != ids.shape:
        raise DataError(f"sample {number} of a batch has {len(labels)} labels, expected {len(ids)}, one per token")
    return ids, labels
