"""``lorakeet quantize``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.options import BASE_FLAGS, base_settings, with_settings


@with_settings({flag: dotted for flag, dotted in BASE_FLAGS.items() if flag != "--bits"})
def quantize(
    settings: dict[str, Any],
    out: Annotated[str, typer.Option(help="folder of the base in 8 bits")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what --out holds")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print what was written as JSON")] = False,
) -> None:
    """Write a base in 8 bits once. The folder is a model like any other here: it opens in seconds, read as it is needed.

    Only one weight at a time is in memory in full precision. Adapters that are trained on it belong to the full base too.

    \b
    examples:
      lorakeet quantize --model ./base --out base-int8
      lorakeet quantize --out smollm2-int8
      lorakeet train --model smollm2-int8 --data quotes.jsonl --out my-run
    """
    from lorakeet import api

    figures = api.quantize(base_settings(settings), out, overwrite=overwrite)
    print(json.dumps(figures) if as_json else figures["path"])
