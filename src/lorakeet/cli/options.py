"""Flags made from the settings: name, type, default and help stand once, in :mod:`lorakeet.config`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

import typer
from pydantic import BaseModel

from lorakeet.config import BaseSettings, RunConfig

#: Base of typer's own complaints, wherever its release keeps click.
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

#: Flag -> dotted setting. The few that one types often; the rest by ``section.key=value``.
BASE_FLAGS = {"--model": "base.model", "--bits": "base.bits", "--dtype": "base.dtype", "--device": "base.device"}
DATA_FLAGS = {"--data": "data.path", "--text-column": "data.columns.text", "--max-length": "data.max_length"}
TRAIN_FLAGS = {
    **BASE_FLAGS,
    "--task": "task.type",
    **DATA_FLAGS,
    "--eval-fraction": "data.eval_fraction",
    "--out": "out",
    "--steps": "train.steps",
    "--batch-size": "train.batch_size",
    "--grad-accum": "train.grad_accum",
    "--lr": "train.lr",
    "--warmup": "train.warmup",
    "--r": "lora.r",
    "--alpha": "lora.lora_alpha",
    "--dropout": "lora.lora_dropout",
    "--target-modules": "lora.target_modules",
    "--seed": "train.seed",
}

#: What a flag says of itself where it sets one entry of a table.
HELP = {"data.columns.text": "column that holds the text; left out: found"}


def setting_field(dotted: str) -> Any:
    """The pydantic field behind a dotted name; that of the whole table, for a name inside one such as data.columns.text."""
    model: Any = RunConfig
    for part in dotted.split("."):
        field = model.model_fields[part]
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
    return field


def _flag_type(annotation: Any) -> type:
    """int, float or str: what the shell's text is read as before the settings check it."""
    kinds = {type(part) if not isinstance(part, type) else part for part in _flat(annotation)}
    if float in kinds:
        return float
    return int if int in kinds and str not in kinds else str


def _flat(annotation: Any) -> list[Any]:
    parts = get_args(annotation)
    return [inner for part in parts for inner in _flat(part)] if parts else [annotation]


def with_settings(
    flags: dict[str, str], defaults: dict[str, Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command these flags; it gets those that were set as ``settings``, a dict of dotted names.

    Args:
        flags: Flag -> dotted setting.
        defaults: Dotted setting -> the default that the help page shows, where the command has its own.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        names = {flag.strip("-").replace("-", "_"): (flag, dotted) for flag, dotted in flags.items()}

        def wrapper(**values: Any) -> Any:
            given = {dotted: _value(dotted, values.pop(name)) for name, (_, dotted) in names.items()}
            return command(settings={key: value for key, value in given.items() if value is not None}, **values)

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [parameter for parameter in own if parameter.name != "settings"]
        wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            kept + [_parameter(name, flag, dotted, defaults or {}) for name, (flag, dotted) in names.items()]
        )
        wrapper.__doc__ = command.__doc__
        return wrapper

    return decorate


def _parameter(name: str, flag: str, dotted: str, defaults: dict[str, Any]) -> inspect.Parameter:
    field = setting_field(dotted)
    default = defaults.get(dotted, field.get_default(call_default_factory=True))
    description = HELP.get(dotted, field.description)
    help_text = description + ("" if default in (None, {}) else f"  [default: {default}]")
    kind = {int: "INT", float: "NUMBER"}.get(_flag_type(field.annotation), "TEXT")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(None, flag, help=help_text, show_default=False, metavar=kind),
        annotation=str | None,
    )


def _value(dotted: str, text: str | None) -> Any:
    """The shell's text as a number where the setting is one; what is no number is left for the settings to refuse."""
    kind = _flag_type(setting_field(dotted).annotation)
    if text is None or kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        return text


def base_settings(settings: dict[str, Any]) -> BaseSettings:
    """The base section alone, out of dotted settings."""
    from lorakeet.config import read_run

    return read_run(None, values={key: value for key, value in settings.items() if key.startswith("base.")}).base


def target_names(text: str) -> list[str] | str:
    """``q_proj,v_proj`` -> a list; one word or a regular expression stays text (a word becomes a list of one)."""
    if text == "all-linear" or any(sign in text for sign in r"\*+?[](){}|^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_and_call(command: Callable[..., Any], name: str, words: list[str]) -> int | None:
    """Parse ``words`` with typer and call the command; its help page ends with its examples."""
    return typer_command(command).main(args=words, prog_name=name, standalone_mode=False)


def typer_command(command: Callable[..., Any]) -> Any:
    """The click command that typer makes of a function."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["--help", "-h"]})(command)
    return typer.main.get_command(app)
