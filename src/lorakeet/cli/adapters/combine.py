"""``lorakeet combine``"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from lorakeet.cli.shared.flags import AllowOtherBases, AsJson, OverwriteOut
from lorakeet.cli.shared.options import bounded
from lorakeet.errors import ConfigError
from lorakeet.security.paths import exists
from lorakeet.setting_types import Count, Seed, Share

How = Annotated[
    str,
    typer.Option(
        help="linear (exact), svd, ties, dare_linear, dare_ties or magnitude_prune; with _svd: of a chosen rank"
    ),
]
Density = Annotated[
    float | None, typer.Option(callback=bounded(Share), help="share of the entries of each update that pruning keeps")
]
Rank = Annotated[
    int | None,
    typer.Option(callback=bounded(Count), help="rank of the methods with svd; default: the largest of the adapters"),
]


def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="folders or hub ids of the adapters")],
    out: Annotated[str, typer.Option(help="folder to write the new adapter to")],
    weights: Annotated[
        str | None,
        typer.Option(help="one weight for each adapter, such as 0.7,-0.3; default: 1/n, for ties 1"),
    ] = None,
    how: How = "linear",
    density: Density = None,
    rank: Rank = None,
    majority_sign: Annotated[
        str, typer.Option(help="how ties elects a sign: total (of the values) or frequency (number of entries)")
    ] = "total",
    seed: Annotated[int, typer.Option(callback=bounded(Seed), help="seed of the entries that dare drops")] = 42,
    overwrite: OverwriteOut = False,
    allow_other_base: AllowOtherBases = False,
    as_json: AsJson = False,
) -> None:
    """Add, mix or subtract adapters of one base, and write the result as a new adapter.

    Reads the adapters alone. Each method is defined on the updates ΔW = s·B·A of the layers.

    \b
    examples:
      lorakeet combine one/adapter two/adapter --weights 0.7,0.3 --out both
      lorakeet combine one/adapter two/adapter --weights 1,-1 --out difference
      lorakeet combine one/adapter two/adapter --how ties --density 0.3 --out mixed
    \f

    Args:
        settings: Every parameter has its help text.
    """
    names, values = _weights(adapters, weights)
    from lorakeet import api

    figures = api.combine_adapters(
        names,
        Path(out),
        values,
        how,
        density=density,
        rank=rank,
        majority_sign_method=majority_sign,
        seed=seed,
        overwrite=overwrite,
        allow_other_base=allow_other_base,
    )
    print(json.dumps(figures) if as_json else _line(figures))


def _weights(words: list[str], given: str | None) -> tuple[list[str], list[float] | None]:
    """Return the adapters and their weights; ``--weights 0.7 0.3`` leaves numbers among the adapters."""
    numbers = [word for word in words if _number(word) is not None and not exists(Path(word))]
    names = [word for word in words if word not in numbers]
    if given is None:
        return words, None
    texts = [*given.replace(",", " ").split(), *numbers]
    values = [_number(text) for text in texts]
    if wrong := [text for text, value in zip(texts, values, strict=True) if value is None or not math.isfinite(value)]:
        raise ConfigError(f"--weights has {wrong[0]!r}, expected numbers such as 0.7,-0.3", "give one for each adapter")
    if len(values) != len(names):
        raise ConfigError(
            f"--weights has {len(values)} numbers for {len(names)} adapters, expected one for each",
            "write them as 0.7,0.3",
        )
    return names, values  # type: ignore[return-value]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _line(figures: dict) -> str:
    ranks = figures["ranks"].values()
    low, high = min(ranks), max(ranks)
    rank = str(low) if low == high else f"{low} to {high}"
    return (
        f"{figures['path']}: {figures['method']} of {len(figures['adapters'])} adapters in {len(ranks)} layers, rank {rank}, "
        f"{figures['parameters']:,} parameters; each layer keeps {figures['energy_kept']:.2%} or more of its energy"
    )
