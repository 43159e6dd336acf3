"""``lorakeet doctor``"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.options import with_settings
from lorakeet.cli.progress import progress_bar
from lorakeet.config import read_run


@with_settings(
    {
        "--max-length": "data.max_length",
        "--text-column": "data.columns.text",
        "--batch-size": "train.batch_size",
        "--grad-accum": "train.grad_accum",
        "--steps": "train.steps",
    }
)
def doctor(
    settings: dict[str, Any],
    data: Annotated[str, typer.Argument(help="file, folder, pattern or hub id of the data; fortunes: quotations")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="further settings of a run")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="base model whose tokenizer counts; left out: nothing is told of tokens")
    ] = None,
    task: Annotated[str, typer.Option(help="what is to be learned, such as SEQ_CLS")] = "auto",
    shown: Annotated[int, typer.Option(min=1, help="problems of each kind to show; all are counted")] = 3,
    plot: Annotated[Path | None, typer.Option(help="write the histogram of lengths to this .png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> int:
    """What is wrong with data, each problem with its file and line. Exit code 2 if a run would be spoilt by it.

    \b
    examples:
      lorakeet doctor quotes.jsonl
      lorakeet doctor quotes.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --plot lengths.png
      lorakeet doctor tickets.csv --task SEQ_CLS data.columns.text=body data.columns.label=queue --json
    """
    run = read_run(None, overrides or [], {**settings, "data.path": data, "task.type": task})
    tokenizer = family = None
    if model is not None:
        from lorakeet.base.load import look_at
        from lorakeet.base.task import family as family_of

        prospect = look_at(run.base.model_copy(update={"model": model}))
        tokenizer, family = prospect.tokenizer, family_of(prospect.config)
    from lorakeet.data.doctor import examine

    with progress_bar("reading") as bar:
        progress = None if bar is None else lambda rows: bar(rows, None)
        found = examine(run.data, run.task, tokenizer, family=family, train=run.train, shown=shown, progress=progress)
    if plot is not None:
        from lorakeet.data.lengths import draw_lengths

        draw_lengths(found.lengths, plot, run.data.max_length if tokenizer is not None else None, data)
    print(json.dumps(found.to_dict()) if as_json else "\n".join(found.lines(colour=sys.stdout.isatty())))
    return 2 if found.stops else 0
