"""``lorakeet train``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.shared.options import TRAIN_FLAGS, with_settings
from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError
from lorakeet.runs.run_folder import folder_of


@with_settings(TRAIN_FLAGS)
def train(
    settings: dict[str, Any],
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN.yaml] [SECTION.KEY=VALUE]...", help="YAML file of a run, then overrides"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --out; without it, the same settings go on too")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in --out")] = False,
    resume_anyway: Annotated[
        bool,
        typer.Option("--resume-anyway", help="resume even if settings, data, base or number of processes differ"),
    ] = False,
    any_checkpoint: Annotated[bool, typer.Option("--any-checkpoint", hidden=True)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Train an adapter. Settings come from the YAML file, then flags, then overrides; the last one wins.

    The folder --out gets run.yaml (repeats the run), metrics.jsonl, loss_curve.png, summary.json and adapter/.

    \b
    examples:
      lorakeet train --data quotes.jsonl --out my-run --steps 200
      lorakeet train run.yaml lora.r=32 data.path=quotes.jsonl
      lorakeet train my-run/run.yaml --resume
      lorakeet train --data tickets.csv --text-column body --target-modules all-linear --r 16
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    config, words, file = run_settings(run, settings), list(run or []), run_file(run)
    given = settings.get("out") is not None or any(word.split("=")[0].strip() == "out" for word in words)
    if (resume or resume_anyway or any_checkpoint) and file and not given:
        config = config.model_copy(update={"out": folder_of(file, config.out)})
    from lorakeet.train.run import run_training

    anyway = resume_anyway or any_checkpoint
    summary = run_training(config, resume=resume or anyway, overwrite=overwrite, any_checkpoint=anyway)
    if as_json:
        print(json.dumps(summary))


def run_file(run: list[str] | None) -> str | None:
    """Return the YAML file among the words of a command; None: there is none."""
    return run[0] if run and "=" not in run[0] else None


def run_settings(run: list[str] | None, settings: dict[str, Any]) -> RunConfig:
    """Return the settings of a run from its YAML file, then flags, then overrides.

    Raises:
        ConfigError: A word is no override, or a setting is wrong.
    """
    file = run_file(run)
    words = list(run or [])[file is not None :]
    if stray := [word for word in words if "=" not in word]:
        raise ConfigError(
            f"{stray[0]!r} is no override, expected section.key=value",
            "give at most one YAML file, before the overrides",
        )
    return read_run(file, words, settings)
