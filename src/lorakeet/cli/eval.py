"""``lorakeet eval``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.options import BASE_FLAGS, DATA_FLAGS, base_settings, with_settings
from lorakeet.cli.progress import progress_bar
from lorakeet.config import read_run
from lorakeet.errors import DataError


@with_settings({**BASE_FLAGS, **DATA_FLAGS})
def eval(
    settings: dict[str, Any],
    adapter: Annotated[str | None, typer.Option(help="folder or hub id of an adapter; default: the base alone")] = None,
    eval_fraction: Annotated[
        float | None, typer.Option(help="evaluate only the rows that a run with this fraction and --seed holds out")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the run, for --eval-fraction")] = 42,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per forward pass")] = 8,
    allow_other_base: Annotated[bool, typer.Option(help="accept an adapter that was trained on another base")] = False,
    allow_untrained: Annotated[bool, typer.Option(help="accept an adapter that never learned")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure the mean loss per target token, the perplexity and the number of target tokens, over all rows of the data.

    Target tokens include the end token. For an adapter of another task, the metrics of that task, such as accuracy.

    \b
    examples:
      lorakeet eval --data quotes.jsonl
      lorakeet eval --adapter my-run/adapter --data quotes.jsonl --json
      lorakeet eval --adapter my-run/adapter --data quotes.jsonl --eval-fraction 0.05
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    if eval_fraction is not None:
        settings["data.eval_fraction"] = eval_fraction
    data = read_run(None, values={key: value for key, value in settings.items() if key.startswith("data.")}).data
    if not data.path:
        raise DataError("no data to evaluate on", "give --data FILE")
    base = base_settings(settings)
    from lorakeet.api import evaluate_data, open_model

    opened = open_model(
        base, [adapter] if adapter else [], allow_other_base=allow_other_base, allow_untrained=allow_untrained
    )
    with progress_bar("evaluating") as progress:
        figures = evaluate_data(
            opened,
            adapter,
            data,
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
