"""``lorakeet bench``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.flags import AsJson
from lorakeet.cli.shared.options import with_settings


@with_settings({"--model": "base.model", "--data": "data.path"}, {"data.path": "fortunes"})
def bench(
    settings: dict[str, Any],
    short: Annotated[bool, typer.Option("--short", help="fewer shapes and steps: about a minute")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine: the rate of each product beside its peak, and tokens/s of training and writing.

    Each number format trains a few steps of the demo's job and writes a text, in its own process. So does PEFT, where it is
    installed. Prints tables to paste, and the fastest settings as a line of YAML. A few minutes on an idle machine.

    \b
    examples:
      lorakeet bench
      lorakeet bench --short
      lorakeet bench --model ./base --data quotes.jsonl --json
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    from lorakeet.base.load import inspect_model
    from lorakeet.cli.bench import products, runs, tables
    from lorakeet.config import read_run
    from lorakeet.kernels.cpu.machine import describe_machine
    from lorakeet.log import info

    config = read_run(None, values={"data.path": "fortunes", **settings})
    inspect_model(config.base)
    found: dict[str, Any] = {"machine": describe_machine()}
    info("1/2 products")
    found |= {"peaks": products.measure_peaks(), "products": products.measure_products(short)}
    info("2/2 training and writing")
    found["runs"] = runs.measure_formats(config, short)
    found |= tables.verdict(found)
    print(json.dumps(found) if as_json else "\n".join(tables.lines(found)))
