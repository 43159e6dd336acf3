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
    fix: Annotated[Path | None, typer.Option(help="write a copy to this .jsonl, with what is certain mended")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what --fix names")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> int:
    """What is wrong with data, each problem with its file and line. Exit code 2 if a run would be spoilt by it.

    --fix writes a copy in which everything is mended that can be mended with certainty, and tells by kind and number what
    was mended, what was left out and what remains; the exit code is then that of the copy. The data itself stays as it is.

    \b
    examples:
      lorakeet doctor quotes.jsonl
      lorakeet doctor quotes.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --plot lengths.png
      lorakeet doctor tickets.csv --task SEQ_CLS data.columns.text=body data.columns.label=queue --json
      lorakeet doctor quotes.jsonl --fix quotes-fixed.jsonl
    """
    run = read_run(None, overrides or [], {**settings, "data.path": data, "task.type": task})
    if fix is not None:
        from lorakeet.data.doctor.fix import check_out

        check_out(run.data, fix, overwrite=overwrite)
    tokenizer = family = None
    if model is not None:
        from lorakeet.base.architectures import family as family_of
        from lorakeet.base.load import inspect_model

        prospect = inspect_model(run.base.model_copy(update={"model": model}))
        tokenizer, family = prospect.tokenizer, family_of(prospect.config)
    from lorakeet.data.doctor.examine import examine

    with progress_bar("reading") as bar:
        progress = None if bar is None else lambda rows: bar(rows, None)
        found = examine(run.data, run.task, tokenizer, family=family, train=run.train, shown=shown, progress=progress)
    if plot is not None:
        from lorakeet.data.doctor.length_histogram import draw_lengths

        draw_lengths(found.lengths, plot, run.data.max_length if tokenizer is not None else None, data)
    colour = sys.stdout.isatty()
    if not as_json:
        print("\n".join(found.lines(colour)), flush=True)
    told, stops = found.to_dict(), found.stops
    if fix is not None:
        from lorakeet.data.doctor.fix import repair

        with progress_bar("writing") as bar:
            progress = None if bar is None else lambda rows: bar(rows, None)
            done = repair(
                run.data,
                run.task,
                fix,
                tokenizer,
                family=family,
                train=run.train,
                overwrite=overwrite,
                shown=shown,
                progress=progress,
            )
        told, stops = {**told, "repaired": done.to_dict()}, done.stops
        if not as_json:
            print("\n".join(done.lines(colour)))
    if as_json:
        print(json.dumps(told))
    return 2 if stops else 0
