"""``lorakeet compare``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.generate import read_prompts
from lorakeet.cli.shared.flags import AllowOtherBases, AsJson
from lorakeet.cli.shared.options import BASE_FLAGS, DATA_FLAGS, bounded, read_data_settings, with_settings
from lorakeet.cli.shared.progress import progress_bar
from lorakeet.setting_types import Count, Fraction, Seed

EvalFraction = Annotated[
    float | None,
    typer.Option(
        callback=bounded(Fraction), help="compare only on the rows that a run with this fraction and --seed holds out"
    ),
]
RunSeed = Annotated[
    int | None,
    typer.Option(callback=bounded(Seed), help="seed of the run, for --eval-fraction; default: the first adapter's"),
]


@with_settings({**BASE_FLAGS, **DATA_FLAGS})
def compare(
    settings: dict[str, Any],
    one: Annotated[str, typer.Argument(help="folder or hub id of an adapter")],
    other: Annotated[str, typer.Argument(help="the same, of the other adapter")],
    eval_fraction: EvalFraction = None,
    seed: RunSeed = None,
    prompt: Annotated[list[str] | None, typer.Option(help="text to complete side by side; repeatable")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with one prompt per line")] = None,
    max_new_tokens: Annotated[int, typer.Option(callback=bounded(Count), help="maximum number of new tokens")] = 60,
    picture: Annotated[str | None, typer.Option(help="PNG to draw: similarity over the layers")] = None,
    allow_other_base: AllowOtherBases = False,
    as_json: AsJson = False,
) -> None:
    """Compare two adapters of one base: their updates layer by layer, and on data or prompts what they do.

    Reads the adapters alone, unless data or prompts are given. --data prints the losses of the base and of both, and in how
    many rows each wins. It prints the KL divergence of a token too, to the base and between them. Intervals are of 95 %.

    \b
    examples:
      lorakeet compare one/adapter two/adapter --picture similarity.png
      lorakeet compare one/adapter two/adapter --data quotes.jsonl --eval-fraction 0.2
      lorakeet compare one/adapter two/adapter --prompt "Beware of" --prompt "Love is"
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    config = read_data_settings([], settings, eval_fraction, needs_data=False)
    from lorakeet import api
    from lorakeet.workshop.text import comparison_text

    with progress_bar("comparing") as progress:
        report = api.compare_adapters(
            one,
            other,
            config.base,
            config.data if config.data.path else None,
            prompts=[*(prompt or []), *(read_prompts(prompts) if prompts else [])],
            allow_other_base=allow_other_base,
            max_new_tokens=max_new_tokens,
            progress=progress,
            held_out_only=eval_fraction is not None,
            seed=seed,
        )
    if picture:
        from lorakeet.workshop.plot import draw_similarity  # which loads matplotlib

        draw_similarity(report, picture)
    print(json.dumps(report, ensure_ascii=False) if as_json else comparison_text(report))
