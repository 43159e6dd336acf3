"""Prediction for texts: classes with scores, tagged words, answer spans, embeddings, masked tokens.

Rows are encoded as in training (:mod:`lorakeet.inference.questions`), so the model reads the tokens that it was taught on.
Answers are decoded as for held-out figures (:mod:`lorakeet.inference.answers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakeet.base.quiet import quiet
from lorakeet.config import TaskSettings
from lorakeet.data.collate import make_collator
from lorakeet.data.encode.encoder import Sample, cannot_encode
from lorakeet.errors import DataError
from lorakeet.eval_mode import evaluating
from lorakeet.facts.vocabulary import embedding_rows
from lorakeet.facts.window import longest_text
from lorakeet.inference.answers import (
    Tag,
    answer_texts,
    best_answers,
    class_answer,
    span_logits,
    window_answers,
    word_tags,
)
from lorakeet.inference.questions import Question, canonical_questions, question_encoder, word_starts
from lorakeet.log import warn

#: Tokens that are proposed for a masked one.
FILLINGS = 5
#: Words of a long text that are tokenized at once, per token of the longest sample.
_WORDS_PER_TOKEN = 4
#: Tokens of the longest sample where neither model, tokenizer nor training limits them.
_NO_LIMIT = 1 << 20
#: Columns of a batch that are no input of the model.
_NO_INPUTS = ("labels", "row", "no_answer", "starts", "ends")


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Sequence[Question],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    pairs: bool | None = None,
) -> list[dict[str, Any]]:
    """Predict the answer of a task for each text.

    A text of more than ``max_length`` tokens is cut as in training, with a warning; its words are tagged in parts. A long
    context is read in overlapping windows.

    Args:
        model: The model with the head of the task.
        tokenizer: Its tokenizer.
        task: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION or MASKED_LM.
        rows: Texts, or mappings: ``text`` and ``text_pair`` for SEQ_CLS, ``tokens`` (a list of words) for TOKEN_CLS,
            ``question`` and ``context`` for QUESTION_ANS.
        batch_size: Rows per batch.
        max_length: Tokens of the longest sample, as in training; None: as many as the model takes.
        pairs: Whether the classifier was trained on pairs of texts; None: as the first row has it.

    Returns:
        A dictionary for each row, by task:

        - SEQ_CLS: ``{"label", "score", "scores"}``; multi-label ``{"labels", "scores"}``; regression ``{"value"}``.
        - TOKEN_CLS: ``{"words": [{"word", "tag", "score", "start", "end"}]}``, words being separated by white space; a word
          for which the tokenizer has no token has the tag None.
        - QUESTION_ANS: ``{"answer", "start", "end", "score"}``; an empty answer means that the text has none.
        - FEATURE_EXTRACTION: ``{"embedding"}``.
        - MASKED_LM: ``{"text", "fillings": [{"text", "token", "score"}]}``.

    Raises:
        DataError: A row is empty, or not of the form that the task needs.
    """
    lengths = [most for most in (max_length, longest_text(model.config, tokenizer)) if most is not None]
    asking = _Asking(model, tokenizer, task, rows, batch_size, min(lengths, default=_NO_LIMIT), pairs)
    with evaluating(model), quiet():
        return asking.answers() if rows else []


def embed(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute an embedding per text: the mean of the last hidden states over its tokens, normalized to length 1.

    Args:
        model: The encoder.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 1 at tokens, 0 at padding.

    Returns:
        fp32 [B, hidden].
    """
    states = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()  # [B, T, hidden]
    real = attention_mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * real).sum(1) / real.sum(1).clamp(min=1), dim=-1)


class _Asking:
    """Rows that one model is asked about.

    Args:
        model, tokenizer, task, rows, batch_size, pairs: As for :func:`predict`.
        max_length: Tokens of the longest sample.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: str,
        rows: Sequence[Question],
        batch_size: int,
        max_length: int,
        pairs: bool | None,
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.given, self.rows = rows, canonical_questions(task, rows, pairs)
        self.batch_size, self.max_length = batch_size, max_length
        roles = list(self.rows[0]) if rows else ["text"]
        self.encoder = question_encoder(task, tokenizer, max_length, roles, embedding_rows(model))
        # nothing is masked here: a text with a masked token is padded as one with a class
        self.collator = make_collator(TaskSettings(type="SEQ_CLS" if task == "MASKED_LM" else task), tokenizer)  # type: ignore[arg-type]

    def answers(self) -> list[dict[str, Any]]:
        """Return the answer to each row."""
        by_task: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
            "SEQ_CLS": self._classes,
            "TOKEN_CLS": self._tags,
            "MASKED_LM": self._fillings,
            "FEATURE_EXTRACTION": self._vectors,
            "QUESTION_ANS": self._spans,
        }
        return by_task[self.task]()

    # ---- samples and batches ------------------------------------------------------------------------------------

    def _all_samples(self) -> list[Sample]:
        """Encode all rows, say how many of them are cut, and refuse a row without a token."""
        samples = self._samples(self.rows)
        if empty := [sample["row"] + 1 for sample in samples if not sample["length"]]:
            raise DataError(f"row {empty[0]} has no token that the model knows", "leave out this row")
        if cut := len({sample["row"] for sample in samples if sample["cut"]}):
            then = "are tagged in parts" if self.task == "TOKEN_CLS" else "are cut: what is beyond is not read"
            warn(f"{cut:,} of {len(self.rows):,} texts have more than {self.max_length:,} tokens and {then}")
        return samples

    def _samples(self, rows: Sequence[dict[str, Any]]) -> list[Sample]:
        """Encode rows as in training."""
        columns, faults = self.encoder({name: [row[name] for row in rows] for name in rows[0]}, range(len(rows)))
        if faults:
            raise cannot_encode([(f"row {number + 1}", fault) for number, fault in faults], "the texts")
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _batches(self, samples: Sequence[Sample]) -> Iterator[dict[str, Tensor]]:
        """Yield batches of samples, on the model's device."""
        columns = [*self.encoder.model_columns(), *self.encoder.answer_columns(), "row"]
        for start in range(0, len(samples), self.batch_size):
            some = samples[start : start + self.batch_size]
            batch = self.collator([{name: sample[name] for name in columns} for sample in some])
            yield {name: value.to(self.model.device) for name, value in batch.items()}

    def _outputs(self, batch: Mapping[str, Tensor]) -> Any:
        return self.model(**{name: value for name, value in batch.items() if name not in _NO_INPUTS})

    # ---- one method for each task -------------------------------------------------------------------------------

    def _classes(self) -> list[dict[str, Any]]:
        problem, names = self.model.config.problem_type, self.model.config.id2label
        batches = self._batches(self._all_samples())
        return [class_answer(logits, problem, names) for batch in batches for logits in self._outputs(batch).logits]

    def _vectors(self) -> list[dict[str, Any]]:
        batches = self._batches(self._all_samples())
        vectors = (embed(self.model, batch["input_ids"], batch["attention_mask"]).tolist() for batch in batches)
        return [{"embedding": vector} for some in vectors for vector in some]

    def _spans(self) -> list[dict[str, Any]]:
        """Find the most likely span of each context, over all windows of a long one."""
        windows = []
        for batch in self._batches(self._all_samples()):
            logits = span_logits(self._outputs(batch), batch["attention_mask"].eq(0))
            windows += window_answers(*logits, batch)
        best = best_answers(windows)
        return [
            {"answer": text, "start": answer.start, "end": answer.end, "score": math.exp(answer.score)}
            for answer, text in zip(best.values(), answer_texts(best, self.rows), strict=True)
        ]

    def _fillings(self) -> list[dict[str, Any]]:
        """Find the likely tokens for the masked one of each text."""
        token, mask = self.tokenizer.mask_token, self.tokenizer.mask_token_id
        for number, row in enumerate(self.rows, start=1):
            if (count := row["text"].count(token)) != 1:
                raise DataError(f"row {number} has {count} masked tokens, expected 1", f"write {token} for the token")
        samples = self._all_samples()
        if beyond := [sample["row"] + 1 for sample in samples if sample["input_ids"].count(mask) != 1]:
            raise DataError(
                f"the masked token of row {beyond[0]} is not among its first {self.max_length:,} tokens",
                "shorten the text before it",
            )
        found: list[dict[str, Any]] = []
        for batch in self._batches(samples):
            masked = batch["input_ids"].eq(mask)
            best = self._outputs(batch).logits[masked].float().softmax(-1).topk(FILLINGS)  # [B, FILLINGS]
            for scores, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                sample = samples[len(found)]
                fillings = [self._filling(sample, mask, *each) for each in zip(tokens, scores, strict=True)]
                found.append({"text": self.rows[sample["row"]]["text"], "fillings": fillings})
        return found

    def _filling(self, sample: Sample, mask: int, token: int, score: float) -> dict[str, Any]:
        filled = [token if each == mask else each for each in sample["input_ids"]]
        text = self.tokenizer.decode(filled, skip_special_tokens=True)
        return {"text": text, "token": self.tokenizer.decode([token]), "score": score}

    def _tags(self) -> list[dict[str, Any]]:
        """Find the tag of each word; a text that is too long goes on with its first word without a tag."""
        found: list[dict[int, Tag]] = [{} for _ in self.rows]  # by number of the word
        self._all_samples()
        waiting = dict.fromkeys(range(len(self.rows)), 0)  # row -> first word without a tag
        while waiting:
            starts, waiting = waiting, {}
            most = _WORDS_PER_TOKEN * self.max_length
            parts = [self.rows[row]["tokens"][first : first + most] for row, first in starts.items()]
            samples = self._samples([{"tokens": part} for part in parts])
            for (row, first), part, sample, tags in zip(
                starts.items(), parts, samples, self._tagged(samples), strict=True
            ):
                found[row] |= {first + tag.word: tag for tag in tags}
                done = max((tag.word for tag in tags), default=0) + 1 if sample["cut"] else len(part)
                if first + done < len(self.rows[row]["tokens"]):
                    waiting[row] = first + done
        return [{"words": list(self._words(*each))} for each in zip(self.given, self.rows, found, strict=True)]

    def _tagged(self, samples: Sequence[Sample]) -> list[list[Tag]]:
        """Return the tags of each sample; none of one without a token."""
        tags: list[list[Tag]] = [[] for _ in samples]
        filled = [at for at, sample in enumerate(samples) if sample["length"]]
        numbers = iter(filled)
        for batch in self._batches([samples[at] for at in filled]):
            for logits, words in zip(self._outputs(batch).logits, batch["labels"], strict=True):
                tags[next(numbers)] = word_tags(logits, words)
        return tags

    def _words(self, given: Question, row: Mapping[str, Any], tags: Mapping[int, Tag]) -> Iterator[dict[str, Any]]:
        """Yield each word with its tag and its place in the text."""
        words = row["tokens"]
        for number, (word, start) in enumerate(zip(words, word_starts(given, words), strict=True)):
            found = tags.get(number)
            tag, score = (None, 0.0) if found is None else (self.model.config.id2label[found.tag], found.score)
            yield {"word": word, "tag": tag, "score": score, "start": start, "end": start + len(word)}
