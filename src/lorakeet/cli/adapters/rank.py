"""``lorakeet rank``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import AsJson, OverwriteOut
from lorakeet.cli.shared.options import BASE_FLAGS, DATA_FLAGS, bounded, read_overrides, with_settings
from lorakeet.errors import ConfigError
from lorakeet.setting_types import Count, Fraction


@with_settings({**BASE_FLAGS, **DATA_FLAGS})
def rank(
    settings: dict[str, Any],
    adapter: Annotated[str, typer.Argument(help="folder or hub id of the adapter")],
    energy: Annotated[
        float | None,
        typer.Option(callback=bounded(Fraction), help="share of each layer's energy to keep; default: 0.99"),
    ] = None,
    resize: Annotated[
        int | None, typer.Option(callback=bounded(Count), help="one rank for all layers of the adapter in --out")
    ] = None,
    out: Annotated[str | None, typer.Option(help="folder to write the adapter of lower rank to")] = None,
    overwrite: OverwriteOut = False,
    picture: Annotated[str | None, typer.Option(help="PNG to draw: ranks over the layers, singular values")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which rank each layer of an adapter needs, and write the nearest adapter of a lower rank.

    Reads the adapter alone. The singular values are those of ΔW = s·B·A, and its energy is the sum of their squares. With
    --out and --data the loss of both adapters is measured on all rows of the data.

    \b
    examples:
      lorakeet rank my-run/adapter --picture ranks.png
      lorakeet rank my-run/adapter --energy 0.99 --out my-adapter-small
      lorakeet rank my-run/adapter --resize 8 --out my-adapter-8 --data quotes.jsonl
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    if resize is not None and energy is not None:
        raise ConfigError("--resize and --energy are both set, and each chooses the ranks", "leave one of them out")
    if resize is not None and out is None:
        raise ConfigError("--resize has no folder to write the adapter to", "give --out FOLDER")
    config = read_overrides([], settings)
    if config.data.path and out is None:
        raise ConfigError("--data compares two adapters, and there is no --out", "give --out FOLDER")
    from lorakeet.rank.report import ENERGY, rank_report, rank_text

    report = rank_report(adapter, energy or ENERGY)
    if picture:
        from lorakeet.rank.plot import draw_ranks  # which loads matplotlib

        draw_ranks(report, picture)
    if out is not None:
        from lorakeet import api

        report["resized"] = api.resize_adapter(
            adapter,
            Path(out),
            config.base,
            config.data if config.data.path else None,
            rank=resize,
            energy=None if resize else energy or ENERGY,
            overwrite=overwrite,
        )
    print(json.dumps(report) if as_json else _text(rank_text(report), report.get("resized")))


def _text(table: str, resized: dict[str, Any] | None) -> str:
    if resized is None:
        return table
    before, after = resized["parameters_before"], resized["parameters_after"]
    lines = [
        table,
        "",
        f"{resized['path']}: {after:,} of {before:,} parameters, each layer keeps {resized['energy_kept']:.4%} or more "
        "of its energy",
    ]
    if "loss_before" in resized:
        was, now = resized["loss_before"], resized["loss_after"]
        lines.append(f"loss on the data: {was:.4f} before, {now:.4f} after ({now / was - 1:+.3%})")
    return "\n".join(lines)
