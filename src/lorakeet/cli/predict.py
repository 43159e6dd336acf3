"""``lorakeet predict``"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakeet.cli.shared.flags import AllowOtherBase, AllowUntrained
from lorakeet.cli.shared.options import BASE_FLAGS, DATA_FLAGS, bounded, check_file, read_overrides, with_settings
from lorakeet.errors import DataError
from lorakeet.setting_types import Count

if TYPE_CHECKING:
    from lorakeet.tasks.taught import Taught


@with_settings({**BASE_FLAGS, **{flag: DATA_FLAGS[flag] for flag in ("--text-column", "--max-length")}})
def predict(
    settings: dict[str, Any],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="further settings of base or data, as of a run"),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="folder or hub id of an adapter")] = None,
    text: Annotated[list[str] | None, typer.Option(help="a text; repeatable")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="file with one text per line, or a table (.jsonl, .csv, .parquet) with columns as in training"
        ),
    ] = None,
    question: Annotated[str | None, typer.Option(help="question to answer from --text, for QUESTION_ANS")] = None,
    batch_size: Annotated[int, typer.Option(callback=bounded(Count), help="texts per forward pass")] = 8,
    allow_other_base: AllowOtherBase = False,
    allow_untrained: AllowUntrained = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per line")] = False,
) -> None:
    """Predict classes, tags, answers, vectors or masked tokens for texts, by the task of the adapter.

    \b
    examples:
      lorakeet predict --adapter my-run/adapter --text "Never volunteer for anything."
      lorakeet predict --adapter my-run/adapter --file tickets.txt --json
      lorakeet predict --adapter my-run/adapter --file tickets.csv --text-column body
      lorakeet predict --adapter answers/adapter --question "Who wrote it?" --text "Hamlet is a play by Shakespeare."
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    config = read_overrides(overrides, settings, ("base", "data"))
    task, taught = _taught(adapter)
    rows: list[Any] = [*(text or []), *(_read(file, task, config.data.columns, taught.columns) if file else [])]
    if question is not None:
        rows = [{"question": question, "context": row} if isinstance(row, str) else row for row in rows]
    if not rows:
        raise DataError("no text", 'give --text "..." or --file FILE')
    from lorakeet import api

    accepted: dict[str, Any] = {"allow_other_base": allow_other_base, "allow_untrained": allow_untrained}
    opened = api.open_model(config.base, [adapter] if adapter else [], verb="predict", **accepted)
    longest = settings.get("data.max_length")
    answers = api.predict(opened, adapter, rows, batch_size=batch_size, max_length=longest)
    for row, found in zip(rows, answers, strict=True):
        given = {"text": row} if isinstance(row, str) else dict(row)
        print(json.dumps({**given, **found}, ensure_ascii=False) if as_json else _line(row, found))


def _taught(adapter: str | None) -> tuple[str, Taught]:
    """Return the task of an adapter and the settings that it was taught with."""
    from lorakeet.adapter.serialization import read_notes
    from lorakeet.loaded_model import adapter_task
    from lorakeet.lora.config import PeftConfig
    from lorakeet.tasks.taught import Taught

    if adapter is None:
        return "SEQ_CLS", Taught()
    return adapter_task(adapter, PeftConfig.from_pretrained(adapter)).name, Taught.from_notes(read_notes(adapter))


def _line(row: str | Mapping[str, str], found: Mapping[str, Any]) -> str:
    """Format a prediction as one line: the answer, its score, the text."""
    text = " ".join(_text(row).split())
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


def _text(row: str | Mapping[str, Any]) -> str:
    """Return what is shown of a row: its question, or all of its texts."""
    if isinstance(row, str):
        return row
    values = [row["question"]] if "question" in row else row.values()
    return " | ".join(" ".join(value) if isinstance(value, list) else value for value in values)


def _read(
    path: Path,
    task: str = "SEQ_CLS",
    columns: Mapping[str, str] | None = None,
    taught: Mapping[str, str] | None = None,
) -> list[Any]:
    """Read the rows of a file; see :func:`lorakeet.inference.questions.read_questions`."""
    from lorakeet.inference.questions import ROLES, read_questions

    check_file(path)
    return read_questions(path, task if task in ROLES else "SEQ_CLS", columns or {}, taught)
