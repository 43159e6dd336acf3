"""``lorakeet predict``"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.options import BASE_FLAGS, base_settings, with_settings
from lorakeet.errors import DataError


@with_settings(BASE_FLAGS)
def predict(
    settings: dict[str, Any],
    adapter: Annotated[str | None, typer.Option(help="folder or hub id of an adapter")] = None,
    text: Annotated[list[str] | None, typer.Option(help="a text; repeatable")] = None,
    file: Annotated[
        Path | None, typer.Option(help="file with one text per line (.jsonl: key 'text', or 'question' and 'context')")
    ] = None,
    question: Annotated[str | None, typer.Option(help="question to answer from --text, for QUESTION_ANS")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts per forward pass")] = 8,
    allow_other_base: Annotated[bool, typer.Option(help="accept an adapter that was trained on another base")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per line")] = False,
) -> None:
    """Predict classes, tags, answers, vectors or masked tokens for texts, by the task of the adapter.

    \b
    examples:
      lorakeet predict --adapter my-run/adapter --text "Never volunteer for anything."
      lorakeet predict --adapter my-run/adapter --file tickets.txt --json
      lorakeet predict --adapter answers/adapter --question "Who wrote it?" --text "Hamlet is a play by Shakespeare."
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    rows: list[str | Mapping[str, str]] = [*(text or []), *(_read(file) if file else [])]
    if question is not None:
        rows = [{"question": question, "context": row} if isinstance(row, str) else row for row in rows]
    if not rows:
        raise DataError("no text", 'give --text "..." or --file FILE')
    base = base_settings(settings)
    from lorakeet import api

    opened = api.open_model(base, [adapter] if adapter else [], allow_other_base=allow_other_base)
    for row, found in zip(rows, api.predict(opened, adapter, rows, batch_size=batch_size), strict=True):
        given = {"text": row} if isinstance(row, str) else dict(row)
        print(json.dumps({**given, **found}, ensure_ascii=False) if as_json else _line(row, found))


def _line(row: str | Mapping[str, str], found: Mapping[str, Any]) -> str:
    """Format a prediction as one line: the answer, its score, the text."""
    text = " ".join((row if isinstance(row, str) else row["question"]).split())
    if "words" in found:
        return " ".join(f"{word['word']}/{word['tag']}" for word in found["words"])
    if "embedding" in found:
        return f"{found['embedding']}\t{text}"
    if "fillings" in found:
        return "\n".join(f"{item['score']:.3f}\t{item['text']}" for item in found["fillings"])
    if "labels" in found:
        return f"{', '.join(found['labels']) or '-'}\t{text}"
    if "value" in found:
        return f"{found['value']:.4f}\t{text}"
    return f"{found.get('label', found.get('answer'))}\t{found['score']:.3f}\t{text}"


def _read(path: Path) -> list[Any]:
    """Read the texts of a file, or its questions with their contexts."""
    from lorakeet.data.read.formats import read_inputs

    rows = []
    for location, row in read_inputs(path, "text"):
        names = ("question", "context") if "question" in row else ("text",)
        if not all(isinstance(row.get(name), str) for name in names):
            raise DataError(
                f"{location.phrase} has no text, expected 'text', or 'question' and 'context'",
                'write each row as {"text": "..."}',
            )
        rows.append({name: row[name] for name in names} if len(names) > 1 else row["text"])
    return rows
