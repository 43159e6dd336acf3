"""Choice of the encoder for rows of a kind and a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.encode.chat import chat_encoder
from lorakeet.data.encode.classification import ClassificationEncoder
from lorakeet.data.encode.encoder import Encoder, Fault
from lorakeet.data.encode.masked import MaskedEncoder
from lorakeet.data.encode.pairs import PairEncoder
from lorakeet.data.encode.question import QuestionEncoder
from lorakeet.data.encode.seq2seq import Seq2SeqEncoder
from lorakeet.data.encode.tagging import TaggingEncoder
from lorakeet.data.encode.text import CompletionEncoder, TextEncoder
from lorakeet.data.rows.column_mapping import Layout
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.errors import DataError

#: Rows that cannot be samples and are written out in an error; further ones are counted.
_SHOWN = 3


@dataclass(frozen=True)
class Given:
    """Arguments of :func:`make_encoder`, for the functions of :data:`ENCODERS`."""

    layout: Layout
    task: TaskSettings
    settings: DataSettings
    tokenizer: Any
    labels: LabelSet | None

    @property
    def max_length(self) -> int:
        return self.settings.max_length

    @property
    def learn_all(self) -> bool:
        return self.settings.learn == "all"

    @property
    def names(self) -> LabelSet:
        if self.labels is None:
            raise ValueError("an encoder of labels needs their names")
        return self.labels


def make_encoder(
    layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: LabelSet | None = None
) -> Encoder:
    """Build the encoder for rows of ``layout.kind`` and a concrete ``task``.

    Args:
        layout: kind of the rows and their columns.
        task: its type is concrete.
        settings: longest sample, and which parts of a row are in the loss.
        tokenizer: of ``transformers``.
        labels: of rows of classes or tags.

    Raises:
        DataError: ``data.learn`` asks for completions of rows that have none, or the rows are not for this task.
        BaseModelError: the tokenizer cannot do what the task needs.
    """
    make = ENCODERS.get((task.type, layout.kind))
    if make is None:
        raise DataError(f"rows of {layout.kind} are not for {task.type}", "choose another task: task.type")
    return make(Given(layout, task, settings, tokenizer, labels))


def cannot_encode(faults: Sequence[tuple[str, Fault]], source: str) -> DataError:
    """Return one error for all rows that cannot be samples, given by location and fault."""
    more = f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
    shown = "; ".join(f"{location}: {fault.message}" for location, fault in faults[:_SHOWN])
    hint = next((fault.hint for _, fault in faults if fault.hint), None)
    return DataError(f"{len(faults):,} row{'s' * (len(faults) > 1)} of {source} cannot be learned: {shown}{more}", hint)


def _text(given: Given) -> Encoder:
    if given.settings.learn == "completion":
        raise DataError(
            "data.learn=completion, but the rows are plain texts",
            "give rows with prompt and completion, or with messages",
        )
    return TextEncoder(given.tokenizer, given.max_length, True)


#: Task and kind of rows -> how their encoder is made. A new kind of rows adds its line here.
ENCODERS: dict[tuple[str, str], Callable[[Given], Encoder]] = {
    ("CAUSAL_LM", "text"): _text,
    ("CAUSAL_LM", "completion"): lambda it: CompletionEncoder(it.tokenizer, it.max_length, it.learn_all),
    ("CAUSAL_LM", "messages"): lambda it: chat_encoder(it.layout, it.tokenizer)(
        it.tokenizer, it.max_length, it.learn_all
    ),
    ("SEQ_CLS", "classes"): lambda it: ClassificationEncoder(
        it.tokenizer, it.max_length, it.names, "text_pair" in it.layout.columns
    ),
    ("TOKEN_CLS", "tags"): lambda it: TaggingEncoder(it.tokenizer, it.max_length, it.names),
    ("SEQ_2_SEQ_LM", "translation"): lambda it: Seq2SeqEncoder(it.tokenizer, it.max_length),
    ("QUESTION_ANS", "question"): lambda it: QuestionEncoder(it.tokenizer, it.max_length),
    ("FEATURE_EXTRACTION", "pairs"): lambda it: PairEncoder(
        it.tokenizer, it.max_length, "negative" in it.layout.columns
    ),
    ("MASKED_LM", "text"): lambda it: MaskedEncoder(it.tokenizer, it.max_length, it.task.whole_word),
}
