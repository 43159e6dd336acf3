"""``lorakeet doctor``"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import AsJson
from lorakeet.cli.shared.options import bounded, with_settings
from lorakeet.cli.shared.progress import progress_bar
from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError
from lorakeet.setting_types import Count

Data = Annotated[
    str | None,
    typer.Argument(help="file, folder, pattern or hub id of the data; fortunes: quotations; left out: this machine"),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="further settings of a run")
]
Model = Annotated[str | None, typer.Option(help="base model whose tokenizer counts tokens; default: no token counts")]


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
    data: Data = None,
    overrides: Overrides = None,
    model: Model = None,
    task: Annotated[str, typer.Option(help="task that the data is for, such as SEQ_CLS")] = "auto",
    shown: Annotated[
        int, typer.Option(callback=bounded(Count), help="problems of each kind to show; all are counted")
    ] = 3,
    plot: Annotated[Path | None, typer.Option(help="write a histogram of lengths to this .png")] = None,
    fix: Annotated[Path | None, typer.Option(help="write a repaired copy of the data to this .jsonl")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file of --fix")] = False,
    as_json: AsJson = False,
) -> int:
    """Report the problems in data, each with its file and line. The exit code is 2 if they would spoil a run.

    Without data, it reports what this machine computes with: its processor, the compiled loops and their self-check, threads.

    --fix writes a copy in which every problem with a certain repair is repaired. It reports what was repaired, what was
    left out and what remains; the exit code is then that of the copy. The data itself is not changed.

    \b
    examples:
      lorakeet doctor
      lorakeet doctor quotes.jsonl
      lorakeet doctor quotes.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --plot lengths.png
      lorakeet doctor tickets.csv --task SEQ_CLS data.columns.text=body data.columns.label=queue --json
      lorakeet doctor quotes.jsonl --fix quotes-fixed.jsonl
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    if data is None:
        if fix is not None or plot is not None or model is not None:
            raise ConfigError("no data to examine", hint="name a file, folder, pattern or hub id first")
        _print_machine(as_json)
        return 0
    run = read_run(None, overrides or [], {**settings, "data.path": data, "task.type": task})
    if fix is not None:
        from lorakeet.data.doctor.fix import check_out

        check_out(run.data, fix, overwrite=overwrite)
    options = {**_model_options(run, model), "train": run.train, "shown": shown}
    examined = _examined(run, options)
    if plot is not None:
        from lorakeet.data.doctor.length_histogram import draw_lengths

        draw_lengths(examined.lengths, plot, run.data.max_length if model is not None else None, data)
    if not as_json:
        _print_lines(examined)
    repaired = None if fix is None else _repaired(run, fix, overwrite, options)
    _print_end(examined, repaired, as_json)
    return 2 if (repaired or examined).stops else 0


def _print_end(examined: Any, repaired: Any, as_json: bool) -> None:
    """Print what is to be told once all is known: the repaired copy, or everything as JSON."""
    if as_json:
        print(json.dumps({**examined.to_dict(), **({"repaired": repaired.to_dict()} if repaired else {})}))
    elif repaired:
        _print_lines(repaired)


def _print_machine(as_json: bool) -> None:
    """Print what this machine computes with."""
    from lorakeet.kernels.cpu.machine import describe_machine

    facts = describe_machine()
    print(json.dumps(facts) if as_json else "\n".join(f"{name:<20}{value}" for name, value in facts.items()))


def _model_options(run: RunConfig, model: str | None) -> dict[str, Any]:
    """Return tokenizer, limits and family of a base model, read without its weights; None of each without a model."""
    if model is None:
        return dict.fromkeys(("tokenizer", "limits", "family"))
    from lorakeet.base.architectures import family
    from lorakeet.base.load import inspect_model
    from lorakeet.facts.limits import limits_of

    found = inspect_model(run.base.model_copy(update={"model": model}))
    return {"tokenizer": found.tokenizer, "limits": limits_of(found.config), "family": family(found.config)}


def _examined(run: RunConfig, options: dict[str, Any]) -> Any:
    """Examine the data, with a progress bar."""
    from lorakeet.data.doctor.examine import examine

    with _row_progress("reading") as progress:
        return examine(run.data, run.task, progress=progress, **options)


def _repaired(run: RunConfig, out: Path, overwrite: bool, options: dict[str, Any]) -> Any:
    """Write and examine a repaired copy of the data, with a progress bar."""
    from lorakeet.data.doctor.fix import repair

    with _row_progress("writing") as progress:
        return repair(run.data, run.task, out, overwrite=overwrite, progress=progress, **options)


@contextmanager
def _row_progress(label: str) -> Iterator[Callable[[int], None] | None]:
    """Yield a function of the rows read so far; None if stderr is no terminal."""
    with progress_bar(label) as bar:
        yield None if bar is None else lambda rows: bar(rows, None)


def _print_lines(result: Any) -> None:
    print("\n".join(result.lines(sys.stdout.isatty())), flush=True)
