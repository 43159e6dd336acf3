"""``lorakeet eval``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import AllowOtherBase, AllowUntrained, AsJson
from lorakeet.cli.shared.options import BASE_FLAGS, DATA_FLAGS, bounded, read_data_settings, with_settings
from lorakeet.cli.shared.progress import progress_bar
from lorakeet.setting_types import Count, Fraction, Seed

EvalFraction = Annotated[
    float | None,
    typer.Option(
        callback=bounded(Fraction), help="evaluate only the rows that a run with this fraction and --seed holds out"
    ),
]
RunSeed = Annotated[
    int | None,
    typer.Option(callback=bounded(Seed), help="seed of the run, for --eval-fraction; default: the adapter's, else 42"),
]
BatchSize = Annotated[
    int | None, typer.Option(callback=bounded(Count), help="rows per forward pass; default: the adapter's, else 8")
]


@with_settings({**BASE_FLAGS, **DATA_FLAGS})
def eval(
    settings: dict[str, Any],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="further settings of base, data or task, as of a run"),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="folder or hub id of an adapter; default: the base alone")] = None,
    eval_fraction: EvalFraction = None,
    seed: RunSeed = None,
    batch_size: BatchSize = None,
    allow_other_base: AllowOtherBase = False,
    allow_untrained: AllowUntrained = False,
    as_json: AsJson = False,
) -> None:
    """Measure the mean loss per target token, the perplexity and the number of target tokens, over all rows of the data.

    Target tokens include the end token. For an adapter of another task, the metrics of that task, such as accuracy.
    Columns, length and what counts as a target are those that the adapter was taught with, unless you say otherwise.

    \b
    examples:
      lorakeet eval --data quotes.jsonl
      lorakeet eval --adapter my-run/adapter --data quotes.jsonl --json
      lorakeet eval --adapter my-run/adapter --data quotes.jsonl --eval-fraction 0.05
      lorakeet eval --adapter my-run/adapter --data tickets.csv data.columns.label=queue
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    config = read_data_settings(overrides, settings, eval_fraction, needs_data=True)
    from lorakeet.api import evaluate_data, open_model

    accepted: dict[str, Any] = {"allow_other_base": allow_other_base, "allow_untrained": allow_untrained}
    opened = open_model(config.base, [adapter] if adapter else [], **accepted)
    with progress_bar("evaluating") as progress:
        figures = evaluate_data(
            opened,
            adapter,
            config.data,
            task_settings=config.task,
            held_out_only=eval_fraction is not None,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    print(json.dumps(figures) if as_json else _line(figures))


def _line(figures: dict[str, Any]) -> str:
    """Format the figures that are single numbers as one line."""
    formats = {"loss": ".4f", "perplexity": ".2f"}
    numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    return "   ".join(
        f"{name} {value:{formats.get(name, '' if isinstance(value, int) else '.4f')}}"
        for name, value in numbers.items()
    )
