"""``lorakeet merge``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import AllowOtherBase, AllowUntrained, OverwriteOut, ResultAsJson
from lorakeet.cli.shared.options import BASE_FLAGS, base_settings, with_settings


@with_settings({flag: dotted for flag, dotted in BASE_FLAGS.items() if flag != "--bits"})
def merge(
    settings: dict[str, Any],
    adapter: Annotated[str, typer.Option(help="folder or hub id of the adapter")],
    out: Annotated[str, typer.Option(help="folder to save the merged model in")],
    overwrite: OverwriteOut = False,
    allow_other_base: AllowOtherBase = False,
    allow_untrained: AllowUntrained = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="merge although the stored number format loses most of the update")
    ] = False,
    as_json: ResultAsJson = False,
) -> None:
    """Merge an adapter into its base and save a plain model that any tool loads.

    The weights are formed in fp32 and stored in the base's own number format, unless --dtype names one. If that format would
    lose the update, or merged and unmerged outputs differ on a probe batch, the merge is refused and nothing is written.

    \b
    examples:
      lorakeet merge --adapter my-run/adapter --out my-model
      lorakeet merge --model ./base --adapter user/adapter --out my-model --dtype bf16
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    from lorakeet import api

    figures = api.merge(
        base_settings(settings),
        adapter,
        out,
        overwrite=overwrite,
        allow_other_base=allow_other_base,
        allow_untrained=allow_untrained,
        accept_loss=accept_loss,
    )
    print(json.dumps(figures) if as_json else figures["path"])
