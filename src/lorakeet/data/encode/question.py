"""Encoder of questions about a text that holds the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from lorakeet.chat_template import check_offsets
from lorakeet.data.encode.classification import type_id_columns
from lorakeet.data.encode.encoder import Batch, Encoder, Sample
from lorakeet.data.read.record import Fault

#: Share of a window's tokens that the next window repeats: 1 / _OVERLAP.
_OVERLAP = 6


@dataclass(frozen=True)
class QuestionEncoder(Encoder):
    """A question and a window of its context, with the first and last token of the answer.

    A context that is too long gives several samples, whose windows overlap. Where a window does not hold the whole
    answer, or there is none, both positions are those of the first special token (CLS).
    """

    def __post_init__(self) -> None:
        check_offsets(self.tokenizer)

    def model_columns(self) -> dict[str, Any]:
        position = datasets.Value("int64")
        return {
            **super().model_columns(),
            **type_id_columns(self.tokenizer),
            "start_positions": position,
            "end_positions": position,
        }

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        questions, cut = self._short_questions(batch["question"])
        encoded = self.tokenizer(
            questions,
            list(batch["context"]),
            truncation="only_second",
            max_length=self.max_length,
            stride=self.max_length // _OVERLAP,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            verbose=False,
        )
        names = ["input_ids", *type_id_columns(self.tokenizer)]
        for window, number in enumerate(encoded["overflow_to_sample_mapping"]):
            try:
                answer = answer_span(batch["context"][number], batch["answers"][number], batch["answer_start"][number])
            except ValueError as error:
                yield number, Fault("answer_place", str(error))
                continue
            start, end = self._positions(encoded, window, answer)
            ids = {name: encoded[name][window] for name in names}
            length = len(ids["input_ids"])
            yield (
                number,
                {
                    **ids,
                    "start_positions": start,
                    "end_positions": end,
                    "length": length,
                    "targets": 1,
                    "cut": cut[number],
                },
            )

    def _short_questions(self, questions: Sequence[str]) -> tuple[list[str], list[bool]]:
        """Cut questions to half of ``max_length``, which leaves room for the context; returns also which were cut."""
        most = max(self.max_length // 2 - 4, 1)
        offsets = self.tokens(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut = [len(spans) > most for spans in offsets]
        ends = [spans[most - 1][1] if is_cut else None for spans, is_cut in zip(offsets, cut, strict=True)]
        return [question[:end] for question, end in zip(questions, ends, strict=True)], cut

    def _positions(self, encoded: Any, window: int, answer: tuple[int, int] | None) -> tuple[int, int]:
        """Return the first and last token of the answer in this window, or the position of "no answer" twice."""
        ids = encoded["input_ids"][window]
        cls = self.tokenizer.cls_token_id
        nowhere = ids.index(cls) if cls in ids else 0
        if answer is None:
            return nowhere, nowhere
        first, last = answer
        parts, offsets = encoded.sequence_ids(window), encoded["offset_mapping"][window]
        inside = [
            at
            for at, (part, (start, end)) in enumerate(zip(parts, offsets, strict=True))
            if part == 1 and start < last and end > first
        ]
        if not inside or offsets[inside[0]][0] > first or offsets[inside[-1]][1] < last:
            return nowhere, nowhere
        return inside[0], inside[-1]


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
