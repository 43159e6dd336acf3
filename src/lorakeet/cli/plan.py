"""``lorakeet plan``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakeet.cli.shared.flags import AsJson
from lorakeet.cli.shared.options import TRAIN_FLAGS, with_settings
from lorakeet.cli.train import run_settings
from lorakeet.config import RunConfig

if TYPE_CHECKING:
    from lorakeet.plan.fit import Fitted


@with_settings(TRAIN_FLAGS)
def plan(
    settings: dict[str, Any],
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN.yaml] [SECTION.KEY=VALUE]...", help="YAML file of a run, then overrides"),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="list every layer")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="predict memory and time without data too, for samples of data.max_length")
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(help="choose changes so that the run fits into this memory, such as 2GB; free: into what is free"),
    ] = None,
    write: Annotated[Path | None, typer.Option(help="write the settings, changes included, to this YAML file")] = None,
    as_json: AsJson = False,
) -> None:
    """List the layers that a run adapts; with data, predict its memory, time and disk space. Reads no weights.

    Takes all settings of `lorakeet train`. Without data, only layers and parameters are counted.

    \b
    examples:
      lorakeet plan --model facebook/opt-6.7b --target-modules q_proj --r 16
      lorakeet plan --layers
      lorakeet plan run.yaml lora.r=32 --data quotes.jsonl
      lorakeet plan --data quotes.jsonl --fit 2GB --write plan.yaml
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    config = run_settings(run, settings)
    from lorakeet.api import fit_training, plan_layers, plan_training

    counted = plan_layers(config.base.model, config.lora, config.task.type)
    if not as_json:
        print_layers(counted, layers)
    fitted = fit_training(config, None if fit == "free" else fit) if fit else None
    planned = None
    if fitted is not None:
        planned = fitted.plan
    elif config.data.path is not None or measure:
        planned = plan_training(config)
    if as_json:
        more = {} if planned is None else {"plan": planned.figures()}
        print(json.dumps({**counted, **more, **({"changes": fitted.changes} if fitted else {})}))
    elif planned is not None:
        from lorakeet.plan.report import table

        print("\n".join(table(planned)))
        if fitted is not None:
            print("\n".join(changes_text(fitted)))
    if write is not None:
        write_settings(fitted.config if fitted else config, write)


def print_layers(counted: dict[str, Any], layers: bool) -> None:
    """Print the layers and the numbers of parameters."""
    trainable, total = counted["trainable_parameters"], counted["all_parameters"]
    print(counted["summary"])
    print(f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total}")
    if layers:
        print("\n".join(counted["layers"]))


def changes_text(fitted: Fitted) -> list[str]:
    """Return the changes as words to add to `lorakeet train`."""
    if not fitted.changes:
        return ["changes      none: it fits as it is"]
    words = " ".join(f"{name}={json.dumps(value)}" for name, value in fitted.changes.items())
    return [f"changes      {words}"]


def write_settings(config: RunConfig, path: Path) -> None:
    """Write settings as YAML."""
    from lorakeet.files import write_file

    with write_file(path) as aside:
        aside.write_text(config.to_yaml(), encoding="utf-8")
