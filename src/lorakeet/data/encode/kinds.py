"""The kinds of data that Lorakeet has: how their columns are found, what a row must have, and who encodes them.

| kind        | canonical columns                                                                                  |
|-------------|----------------------------------------------------------------------------------------------------|
| text        | text                                                                                               |
| completion  | prompt, completion                                                                                 |
| messages    | messages (JSON), tools (JSON or null), given (the first so many messages are never in the loss)    |
| classes     | text, text_pair (only where there are pairs), label: string, int64, float64 or a list of them      |
| tags        | tokens, tags (strings or int64)                                                                    |
| pairs       | anchor, positive, negative (only where there are some)                                             |
| translation | source, target                                                                                     |
| question    | question, context, answers, answer_start (both empty: there is no answer)                          |

A row without a value for a column has null there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.encode.chat import chat_encoder
from lorakeet.data.encode.classification import ClassificationEncoder
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.masked import MaskedEncoder
from lorakeet.data.encode.pairs import PairEncoder
from lorakeet.data.encode.question import QuestionEncoder
from lorakeet.data.encode.seq2seq import Seq2SeqEncoder
from lorakeet.data.encode.tagging import TaggingEncoder
from lorakeet.data.encode.text import CompletionEncoder, TextEncoder
from lorakeet.data.read.column_types import INT, INT_LIST, STR_LIST, ColumnTypes
from lorakeet.data.rows import normalize
from lorakeet.data.rows.column_mapping import LABEL_NAMES, label_type, tag_type
from lorakeet.data.rows.conversations import message_texts
from lorakeet.data.rows.kinds import Column, Kind, Layout, Roles, find_kind, register, role
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.errors import DataError
from lorakeet.facts.vocabulary import tokens_without_row


def _text(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    if settings.learn == "completion":
        raise DataError(
            "data.learn=completion, but the rows are plain texts",
            "give rows with prompt and completion, or with messages",
        )
    return TextEncoder(tokenizer, settings.max_length, True)


def _completion(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    return CompletionEncoder(tokenizer, settings.max_length, settings.learn == "all")


def _messages(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    return chat_encoder(layout, tokenizer)(tokenizer, settings.max_length, settings.learn == "all")


def _masked(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    return MaskedEncoder(tokenizer, settings.max_length, task.whole_word)


def _classes(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    names = _known(labels) if "label" in layout.columns else None
    return ClassificationEncoder(tokenizer, settings.max_length, names, "text_pair" in layout.columns)


def _tags(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    return TaggingEncoder(tokenizer, settings.max_length, _known(labels) if "tags" in layout.columns else None)


def _translation(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    return Seq2SeqEncoder(tokenizer, settings.max_length)


def _question(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    return QuestionEncoder(tokenizer, settings.max_length, "answers" in layout.columns)


def _pairs(layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: Any) -> Encoder:
    texts = tuple(name for name in ("anchor", "positive", "negative") if name in layout.columns)
    return PairEncoder(tokenizer, settings.max_length, texts)


def _known(labels: LabelSet | None) -> LabelSet:
    if labels is None:
        raise ValueError("an encoder of labels needs their names")
    return labels


def _some_list(types: Mapping[str, ColumnTypes]) -> bool:
    return any(one.is_list for found in types.values() for one in found)


#: Names of a column of text; the first wins, two of the others are ambiguous.
_TEXTS = ("text", "quote", "quotation", "content", "sentence", "document", "body", "passage", "story")
_SOME_TEXT = role(*_TEXTS, takes_rest=True)
_CLASSIFIED = {"text": role(*_TEXTS, "text1", "sentence1", "premise", takes_rest=True)}
_SECOND_TEXT = {"text_pair": role("text_pair", "text2", "sentence2", "hypothesis")}
_ASKED = {"question": role("question"), "context": role("context", "passage")}
_PARTS = {
    "prompt": role("prompt", holds=("str", "list")),
    "completion": role("completion", "response", holds=("str", "list")),
}
_TOOLS = {"tools": role("tools", holds=("list", "str", "null"))}
_SYSTEM = {"system": role("system")}
_ALPACA = Roles(
    {"instruction": role("instruction"), "output": role("output", "response")},
    {"input": role("input", "context"), **_SYSTEM},
)

TEXT = Kind(
    "text",
    roles=(Roles({"text": _SOME_TEXT}),),
    columns=(Column("text"),),
    normalize=None,
    encoders={"CAUSAL_LM": _text, "MASKED_LM": _masked},
    asked=Roles({"text": _SOME_TEXT}),
)
COMPLETION = Kind(
    "completion",
    roles=(Roles(_PARTS),),
    columns=(Column("prompt", may_be_empty=True), Column("completion")),
    normalize=None,
    encoders={"CAUSAL_LM": _completion},
)
MESSAGES = Kind(
    "messages",
    roles=(
        Roles({"messages": role("messages", holds=("list", "str"))}, {**_TOOLS, **_SYSTEM}),
        Roles({"conversations": role("conversations", "conversation", holds=("list", "str"))}, {**_TOOLS, **_SYSTEM}),
        _ALPACA,
        Roles(_PARTS, {**_TOOLS, **_SYSTEM}, fits=_some_list),
    ),
    columns=(
        Column("messages", is_text=False),
        Column("tools", required=False, is_text=False, in_content=False),
        Column("given", INT, required=False, is_text=False, in_content=False),
    ),
    normalize=normalize.conversation,
    encoders={"CAUSAL_LM": _messages},
    texts=lambda row: message_texts(json.loads(row["messages"])),
)
CLASSES = Kind(
    "classes",
    roles=(
        Roles(
            {**_CLASSIFIED, "label": role(*LABEL_NAMES, holds=("str", "int", "float", "bool", "list"))},
            _SECOND_TEXT,
        ),
    ),
    columns=(
        Column("text"),
        Column("text_pair", optional=True, may_be_empty=True),
        Column("label", label_type, may_be_empty=True, is_text=False, in_content=False, is_answer=True),
    ),
    normalize=normalize.labelled_text,
    encoders={"SEQ_CLS": _classes},
    asked=Roles(_CLASSIFIED, _SECOND_TEXT),
    labels="label",
)
TAGS = Kind(
    "tags",
    roles=(
        Roles(
            {
                "tokens": role("tokens", "words", holds=("list", "str")),
                "tags": role("tags", "labels", "ner_tags", "pos_tags", "upos", holds=("list", "str")),
            }
        ),
    ),
    columns=(
        Column("tokens", STR_LIST),
        Column("tags", tag_type, may_be_empty=True, is_text=False, in_content=False, is_answer=True),
    ),
    normalize=normalize.tagged_tokens,
    encoders={"TOKEN_CLS": _tags},
    asked=Roles({"tokens": role("tokens", "words", *_TEXTS, holds=("list", "str"), takes_rest=True)}),
    labels="tags",
)
PAIRS = Kind(
    "pairs",
    roles=(
        Roles(
            {
                "anchor": role("anchor", "query", "sentence1", "text1", "question"),
                "positive": role("positive", "sentence2", "text2", "answer"),
            },
            {"negative": role("negative")},
        ),
    ),
    columns=(Column("anchor"), Column("positive"), Column("negative", optional=True, in_content=False)),
    normalize=None,
    encoders={"FEATURE_EXTRACTION": _pairs},
    asked=Roles({"anchor": role("anchor", *_TEXTS, "query", "sentence1", "text1", "question", takes_rest=True)}),
)
TRANSLATION = Kind(
    "translation",
    roles=(
        Roles(
            {"source": role("source", "src", "prompt"), "target": role("target", "tgt", "completion")},
            members_of="translation",
        ),
        _ALPACA,
        Roles({"source": role("input"), "target": role("output")}, members_of="translation"),
    ),
    columns=(Column("source"), Column("target", in_content=False)),
    normalize=normalize.translation,
    encoders={"SEQ_2_SEQ_LM": _translation},
)
QUESTION = Kind(
    "question",
    roles=(
        Roles(
            {
                **_ASKED,
                "answers": role("answers", "answer", holds=("dict", "list", "str")),
            },
            {"answer_start": role("answer_start", holds=("list", "int"))},
        ),
    ),
    columns=(
        Column("question"),
        Column("context"),
        Column("answers", STR_LIST, may_be_empty=True, is_text=False, in_content=False, is_answer=True),
        Column("answer_start", INT_LIST, may_be_empty=True, is_text=False, in_content=False, is_answer=True),
    ),
    normalize=normalize.question,
    encoders={"QUESTION_ANS": _question},
    asked=Roles(_ASKED),
)


def register_kinds() -> None:
    """Register all of these; of those for one task, the last is tried first."""
    for kind in (QUESTION, TRANSLATION, PAIRS, TAGS, CLASSES, TEXT, COMPLETION, MESSAGES):
        register(kind)


def make_encoder(
    layout: Layout,
    task: TaskSettings,
    settings: DataSettings,
    tokenizer: Any,
    labels: LabelSet | None = None,
    vocabulary: int | None = None,
) -> Encoder:
    """Make the encoder for rows of ``layout`` and a concrete ``task``.

    Args:
        layout: Kind and columns of the rows.
        task: What is trained.
        settings: ``max_length`` and ``learn``.
        tokenizer: Of ``transformers``.
        labels: Names of the classes or tags, where the kind has any.
        vocabulary: Rows of the model's embedding; None: enough for every token.

    Raises:
        DataError: ``data.learn`` asks for completions of rows that have none, or the rows are not for this task.
        BaseModelError: the tokenizer cannot do what the task needs.
    """
    make = find_kind(layout.kind).encoders.get(task.type)
    if make is None:
        raise DataError(f"rows of {layout.kind} are not for {task.type}", "choose another task: task.type")
    encoder: Encoder = make(layout, task, settings, tokenizer, labels)
    return replace(encoder, vocabulary=vocabulary) if tokens_without_row(tokenizer, vocabulary) else encoder
