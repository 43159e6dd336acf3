"""``lorakeet extract``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import AsJson, OverwriteOut
from lorakeet.cli.shared.options import BASE_FLAGS, base_settings, bounded, with_settings
from lorakeet.errors import ConfigError
from lorakeet.setting_types import Count, Fraction


@with_settings({flag: dotted for flag, dotted in BASE_FLAGS.items() if flag == "--model"})
def extract(
    settings: dict[str, Any],
    tuned: Annotated[str, typer.Argument(help="folder or hub id of the model that was trained whole")],
    out: Annotated[str, typer.Option(help="folder to write the adapter to")],
    rank: Annotated[int | None, typer.Option(callback=bounded(Count), help="rank of every layer")] = None,
    energy: Annotated[
        float | None,
        typer.Option(callback=bounded(Fraction), help="share of each layer's energy to keep; default: 0.99"),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="adapt the embedding and the head too")] = False,
    overwrite: OverwriteOut = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter out of a model that was trained whole and its base.

    Each layer gets the nearest update of the rank to the difference of its weights. The files of both models are read tensor
    by tensor, so neither has to fit into memory. Norms that changed are saved whole; what the adapter cannot hold is named.

    \b
    examples:
      lorakeet extract my-model --rank 16 --out my-adapter-16
      lorakeet extract my-model --model ./base --energy 0.9 --out my-adapter
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    if rank is not None and energy is not None:
        raise ConfigError("--rank and --energy are both set, and each chooses the ranks", "leave one of them out")
    from lorakeet.api import check_empty
    from lorakeet.cli.shared.progress import progress_bar
    from lorakeet.rank.extract import extract as extract_adapter
    from lorakeet.rank.report import ENERGY

    folder, share = check_empty(out, overwrite), ENERGY if rank is None and energy is None else energy
    base = base_settings(settings).model
    with progress_bar("extracting") as progress:
        made = extract_adapter(tuned, base, folder, rank=rank, energy=share, embeddings=embeddings, progress=progress)
    print(json.dumps(made) if as_json else made["path"])
