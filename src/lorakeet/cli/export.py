"""``lorakeet export``"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

from lorakeet.cli.shared.flags import AllowOtherBase, OverwriteOut, ResultAsJson
from lorakeet.cli.shared.options import BASE_FLAGS, base_settings, bounded, with_settings
from lorakeet.setting_types import Count


@with_settings({flag: dotted for flag, dotted in BASE_FLAGS.items() if flag != "--bits"})
def export(
    settings: dict[str, Any],
    adapter: Annotated[str, typer.Argument(help="folder or hub id of the adapter")],
    consumer: Annotated[
        Literal["peft", "vllm", "gguf", "mlx", "merged", "merged-gguf"],
        typer.Option("--for", help="tool that will load it; merged, merged-gguf: a whole model"),
    ],
    out: Annotated[str, typer.Option(help="folder to write")],
    form: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"], typer.Option("--format", help="number format of merged-gguf")
    ] = "f16",
    rank: Annotated[
        int | None, typer.Option(callback=bounded(Count), help="rank of the plain LoRA that a variant becomes")
    ] = None,
    overwrite: OverwriteOut = False,
    allow_other_base: AllowOtherBase = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="export although rounding or a lower rank loses most of the update")
    ] = False,
    as_json: ResultAsJson = False,
) -> None:
    """Write an adapter for another tool, or the model that it makes of its base.

    What the tool cannot read is refused before anything is written. Scales are multiplied into B where the tool would ignore
    them. A variant that is no plain LoRA becomes plain LoRA by a decomposition, with its loss in the log.

    \b
    examples:
      lorakeet export my-run/adapter --for vllm --out my-vllm-adapter
      lorakeet export my-run/adapter --for mlx --out my-mlx-adapter
      lorakeet export my-run/adapter --for merged-gguf --format q8_0 --out my-gguf
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    from lorakeet import api
    from lorakeet.export.run import ExportOptions

    accepted = {"allow_other_base": allow_other_base, "accept_loss": accept_loss}
    options = ExportOptions(form, rank, overwrite, accepted)
    figures = api.export(adapter, consumer, out, base_settings(settings), options)
    print(json.dumps(figures) if as_json else figures["path"])
