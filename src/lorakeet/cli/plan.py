"""``lorakeet plan``"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakeet.cli.options import with_settings
from lorakeet.config import DEFAULT_MODEL, read_run


@with_settings({"--r": "lora.r", "--alpha": "lora.lora_alpha", "--target-modules": "lora.target_modules"})
def plan(
    settings: dict[str, Any],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[lora.KEY=VALUE]...", help="further settings of LoRA")
    ] = None,
    model: Annotated[str, typer.Option(help="hub id or local folder; only its config is read")] = DEFAULT_MODEL,
    task: Annotated[str, typer.Option(help="task of the model, such as SEQ_CLS")] = "auto",
    layers: Annotated[bool, typer.Option("--layers", help="list every layer")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the layers that would be adapted, and count the trainable parameters. Reads the model's config, no weights.

    \b
    examples:
      lorakeet plan --model facebook/opt-6.7b --target-modules q_proj,v_proj --r 16 --alpha 32
      lorakeet plan --target-modules all-linear --layers
    \f

    Args:
        settings: Settings set by flags, by dotted name; every other parameter has its help text.
    """
    run = read_run(None, overrides or [], {**settings, "task.type": task})
    from lorakeet.api import plan_layers

    found = plan_layers(model, run.lora, run.task.type)
    if as_json:
        print(json.dumps(found))
        return
    trainable, total = found["trainable_parameters"], found["all_parameters"]
    print(found["summary"])
    print(f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total}")
    if layers:
        print("\n".join(found["layers"]))
