"""``lorakeet quantize``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import OverwriteOut, ResultAsJson
from lorakeet.cli.shared.options import BASE_FLAGS, base_settings, with_settings


@with_settings({flag: dotted for flag, dotted in BASE_FLAGS.items() if flag != "--bits"})
def quantize(
    settings: dict[str, Any],
    out: Annotated[str, typer.Option(help="folder to save the quantized base in")],
    bits: Annotated[int, typer.Option("--bits", help="bits per weight, 8 or 4")] = 8,
    layout: Annotated[
        str, typer.Option("--layout", help="names of the tensors: lorakeet, or bitsandbytes with 4 bits")
    ] = "lorakeet",
    overwrite: OverwriteOut = False,
    as_json: ResultAsJson = False,
) -> None:
    """Quantize a base and save it. The folder is a model for every command; its weights are read on demand.

    Only one weight at a time is in memory in full precision. What stays unquantized keeps the base's own number format,
    unless --dtype names one. Adapters trained on it also fit the full-precision base.

    \b
    examples:
      lorakeet quantize --model ./base --out base-int8
      lorakeet quantize --out smollm2-int8
      lorakeet quantize --bits 4 --out smollm2-nf4
      lorakeet train --model smollm2-int8 --data quotes.jsonl --out my-run
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    from lorakeet import api

    figures = api.quantize(base_settings(settings), out, bits=bits, layout=layout, overwrite=overwrite)
    print(json.dumps(figures) if as_json else figures["path"])
