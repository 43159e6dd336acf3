"""Encoder of questions about a text that holds the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from lorakeet.chat.turns import check_offsets
from lorakeet.data.encode.classification import type_id_columns
from lorakeet.data.encode.encoder import Batch, Encoder, Sample, ids_type
from lorakeet.data.read.record import Fault
from lorakeet.facts.special_tokens import kept_positions

#: Share of a window's tokens that the next window repeats: 1 / _OVERLAP.
_OVERLAP = 6


@dataclass(frozen=True)
class QuestionEncoder(Encoder):
    """A question and a window of its context, with the first and last token of the answer.

    A context that is too long gives several samples, whose windows overlap. Where a window does not hold the whole
    answer, or there is none, both positions are those of the first special token (CLS).

    Attributes:
        answered: every row has its answers; without them the samples have no positions.
    """

    answered: bool = True

    def __post_init__(self) -> None:
        check_offsets(self.tokenizer)

    def model_columns(self) -> dict[str, Any]:
        position = datasets.Value("int64")
        positions = {"start_positions": position, "end_positions": position} if self.answered else {}
        return {**super().model_columns(), **type_id_columns(self.tokenizer), **positions}

    def answer_columns(self) -> dict[str, Any]:
        """Return the position of "no answer", and the characters of the context that each token stands for.

        ``starts`` and ``ends`` are int32 [length], -1 for a token outside of the context.
        """
        return {"no_answer": datasets.Value("int64"), "starts": ids_type(), "ends": ids_type()}

    def settings(self) -> list[Any]:
        return [*super().settings(), self.answered]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        questions, cut = self._short_questions(batch["question"])
        encoded = self._windows(questions, batch["context"])
        names = ["input_ids", *type_id_columns(self.tokenizer)]
        for window, number in enumerate(encoded["overflow_to_sample_mapping"]):
            kept = kept_positions(encoded["input_ids"][window], encoded["special_tokens_mask"][window])
            sample = {name: [encoded[name][window][at] for at in kept] for name in names}
            sample |= self._places(encoded, window, kept)
            if self.answered:
                row = (batch[name][number] for name in ("context", "answers", "answer_start"))
                try:
                    sample |= _positions(sample, answer_span(*row))
                except ValueError as error:
                    yield number, Fault("answer_place", str(error))
                    continue
            yield number, {**sample, "length": len(sample["input_ids"]), "targets": 1, "cut": cut[number]}

    def _windows(self, questions: Sequence[str], contexts: Sequence[str]) -> Any:
        """Tokenize questions with overlapping windows of their contexts."""
        return self.tokenizer(
            questions,
            list(contexts),
            truncation="only_second",
            max_length=self.max_length,
            stride=self.max_length // _OVERLAP,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            padding=False,
            verbose=False,
        )

    def _short_questions(self, questions: Sequence[str]) -> tuple[list[str], list[bool]]:
        """Cut questions to half of ``max_length``, which leaves room for the context; returns also which were cut."""
        most = max(self.max_length // 2 - 4, 1)
        offsets = self.tokens(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut = [len(spans) > most for spans in offsets]
        ends = [spans[most - 1][1] if is_cut else None for spans, is_cut in zip(offsets, cut, strict=True)]
        return [question[:end] for question, end in zip(questions, ends, strict=True)], cut

    def _places(self, encoded: Any, window: int, kept: Sequence[int]) -> Sample:
        """Return the columns that decode an answer at the ``kept`` positions of this window."""
        parts, offsets = encoded.sequence_ids(window), encoded["offset_mapping"][window]
        ids, cls = [encoded["input_ids"][window][at] for at in kept], self.tokenizer.cls_token_id
        spans = [offsets[at] if parts[at] == 1 and offsets[at][0] < offsets[at][1] else (-1, -1) for at in kept]
        starts, ends = ([span[side] for span in spans] for side in (0, 1))
        return {"no_answer": ids.index(cls) if cls in ids else 0, "starts": starts, "ends": ends}


def _positions(window: Sample, answer: tuple[int, int] | None) -> Sample:
    """Return the first and last token of the answer in this window, or the position of "no answer" twice."""
    nowhere = dict.fromkeys(("start_positions", "end_positions"), window["no_answer"])
    if answer is None:
        return nowhere
    first, last = answer
    starts, ends = window["starts"], window["ends"]
    inside = [at for at, (start, end) in enumerate(zip(starts, ends, strict=True)) if -1 < start < last and end > first]
    if not inside or starts[inside[0]] > first or ends[inside[-1]] < last:
        return nowhere
    return {"start_positions": inside[0], "end_positions": inside[-1]}


def answer_span(context: str, answers: Sequence[str], starts: Sequence[int]) -> tuple[int, int] | None:
    """Return the span of the first answer in characters, without white space around it; None: no answer.

    Raises:
        ValueError: the answer is not at its start.
    """
    if not answers:
        return None
    answer, start = answers[0], starts[0]
    if start < 0 or context[start : start + len(answer)] != answer:
        raise ValueError(f"answer {answer!r:.40} is not at character {start} of its context")
    inner = answer.strip()
    if not inner:
        return None
    start += len(answer) - len(answer.lstrip())
    return start, start + len(inner)
