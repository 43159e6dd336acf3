"""Questions to a model: rows without an answer, read, checked, and encoded as the training of the task does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.encode.encoder import Encoder
from lorakeet.data.encode.kinds import make_encoder
from lorakeet.data.read.column_types import TypeInference, value_of
from lorakeet.data.read.formats import read_inputs, suffix
from lorakeet.data.read.record import Fault, faults_error
from lorakeet.data.rows.column_mapping import question_columns
from lorakeet.data.rows.kinds import Layout, kinds_for
from lorakeet.errors import DataError

#: A row to predict for: a text, or values by role.
Question: TypeAlias = str | Mapping[str, Any]

#: Roles of a row by task; the first one is that of a plain text.
ROLES: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("text", "text_pair"),
    "TOKEN_CLS": ("tokens",),
    "QUESTION_ANS": ("question", "context"),
    "FEATURE_EXTRACTION": ("anchor",),
    "MASKED_LM": ("text",),
}
#: Rows that are written out in an error; further ones are counted.
_SHOWN = 3


def question_encoder(
    task: str, tokenizer: Any, max_length: int, roles: Sequence[str], vocabulary: int | None = None
) -> Encoder:
    """Return the encoder that the training of ``task`` has, for rows that hold only ``roles``.

    Args:
        task: One of :data:`ROLES`.
        tokenizer: Of ``transformers``.
        max_length: Tokens of the longest sample.
        roles: Roles of each row.
        vocabulary: Rows of the model's embedding; None: enough for every token.
    """
    settings = TaskSettings.model_validate({"type": task})
    [kind] = kinds_for(settings.type)
    layout = Layout(kind.name, {role: role for role in roles})
    return make_encoder(layout, settings, DataSettings(max_length=max_length), tokenizer, vocabulary=vocabulary)


def read_questions(
    path: Path, task: str, columns: Mapping[str, str], taught: Mapping[str, str] | None = None
) -> list[Question]:
    """Read the rows of a file to predict for: of a text file its lines, of any other the columns that a training reads.

    Args:
        path: The file, in any format of :mod:`lorakeet.data.read.formats`.
        task: One of :data:`ROLES`.
        columns: Role -> column, where the user says it.
        taught: Role -> column of the training, taken where the file has that column; None: unknown.

    Returns:
        A text for each row, or its values by role if it has several.

    Raises:
        DataError: The file cannot be read or lacks a column, or some rows hold no text.
    """
    found = read_inputs(path, ROLES[task][0])
    types = TypeInference(numbers=suffix(path) == ".csv")
    for _, values in found:
        types.add(values)
    known = types.types()
    given = {role: column for role, column in (taught or {}).items() if column in known} | dict(columns)
    without = [role for role in ROLES[task] if taught and role not in taught]
    mapping = question_columns(known, given, TaskSettings.model_validate({"type": task}).type, str(path), without)
    rows, faults = list[Question](), []
    for location, values in found:
        row = {role: value_of(values, column) for role, column in mapping.items()}
        blank = [mapping[role] for role, value in row.items() if not _is_usable(role, _words(role, value))]
        if blank:
            shown = " and ".join(map(repr, blank))
            faults.append((location, Fault("empty", f"no text in column {shown}", "fix or remove these rows")))
        texts = [value for value in row.values() if isinstance(value, str)]
        rows.append(texts[0] if len(texts) == len(row) == 1 else row)
    if faults:
        raise faults_error(faults)
    return rows


def canonical_questions(task: str, questions: Sequence[Question], pairs: bool | None = None) -> list[dict[str, Any]]:
    """Return the canonical columns of rows to predict for.

    Args:
        task: One of :data:`ROLES`.
        questions: Texts, or values by role; ``text`` stands for the role of a plain text.
        pairs: Whether a classifier was trained on pairs of texts; None: as the first row has it.

    Raises:
        DataError: Some rows are empty, or not of the form that the task needs; the first of them are listed.
    """
    if pairs is None and task == "SEQ_CLS":
        pairs = any(isinstance(row, Mapping) and row.get("text_pair") is not None for row in questions[:1])
    roles = [role for role in ROLES[task] if pairs or role != "text_pair"]
    rows, problems = [], []
    for number, question in enumerate(questions, start=1):
        row = _values(task, question)
        rows.append({role: row.get(role) for role in roles})
        second = pairs is False and row.get("text_pair") is not None
        if second or not all(_is_usable(role, value) for role, value in rows[-1].items()):
            only = "one text, as the model was taught" if second else " and ".join(roles)
            problems.append(f"row {number} is {question!r:.60}, expected {only}")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        hint = "fix or remove these rows"
        if pairs:
            hint = "the model was taught on pairs of texts: give text and text_pair, in a file or as a mapping"
        raise DataError(f"invalid rows for {task}: {'; '.join(problems[:_SHOWN])}{more}", hint)
    return rows


def word_starts(question: Question, words: Sequence[str]) -> list[int]:
    """Return where each of the words of a row begins: in its text, or in the words joined by spaces."""
    given = question if isinstance(question, str) else question.get("tokens", question.get("text"))
    if isinstance(given, str):
        return [match.start() for match in re.finditer(r"\S+", given)]
    return list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))


def _values(task: str, question: Question) -> Mapping[str, Any]:
    """Return the values of a row by role; words are separated by white space."""
    first = ROLES[task][0]
    row = {first: question} if isinstance(question, str) else question if isinstance(question, Mapping) else {}
    if first not in row and "text" in row:
        row = {**row, first: row["text"]}
    return {role: _words(role, value) for role, value in row.items()}


def _words(role: str, value: Any) -> Any:
    """Return the words of a text of ``tokens``, as training splits it; any other value unchanged."""
    return value.split() if role == "tokens" and isinstance(value, str) else value


def _is_usable(role: str, value: Any) -> bool:
    """Whether a value may play a role, as in training: not blank, but for the second text, and words of whole characters."""
    if role == "tokens":
        return (
            isinstance(value, list) and bool(value) and all(isinstance(word, str) and _is_whole(word) for word in value)
        )
    return isinstance(value, str) and (role == "text_pair" or bool(value.strip())) and _is_whole(value)


def _is_whole(text: str) -> bool:
    """Whether a text has no half character: JSON can hold half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in text)
