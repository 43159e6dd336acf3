"""Flags derived from the settings: type, default and help come from :mod:`lorakeet.config`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lorakeet.config import BaseSettings, RunConfig, read_run
from lorakeet.errors import ConfigError, DataError
from lorakeet.security.paths import is_dir, is_file
from lorakeet.setting_types import plain_types, setting_names, text_error

#: Base class of typer's usage errors; releases of typer keep click in different places.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

#: Flag -> dotted setting, for the settings typed most often; the others are set by ``section.key=value``.
BASE_FLAGS = {"--model": "base.model", "--bits": "base.bits", "--dtype": "base.dtype", "--device": "base.device"}
DATA_FLAGS = {"--data": "data.path", "--text-column": "data.columns.text", "--max-length": "data.max_length"}
TRAIN_FLAGS = {
    **BASE_FLAGS,
    "--task": "task.type",
    **DATA_FLAGS,
    "--eval-fraction": "data.eval_fraction",
    "--out": "out",
    "--steps": "train.steps",
    "--epochs": "train.epochs",
    "--batch-size": "train.batch_size",
    "--grad-accum": "train.grad_accum",
    "--lr": "train.lr",
    "--warmup": "train.warmup",
    "--r": "lora.r",
    "--alpha": "lora.lora_alpha",
    "--dropout": "lora.lora_dropout",
    "--use-dora": "lora.use_dora",
    "--target-modules": "lora.target_modules",
    "--init-lora-weights": "lora.init_lora_weights",
    "--init-adapter": "train.init_adapter",
    "--seed": "train.seed",
    "--save-every": "train.save_every",
    "--on-nonfinite": "train.non_finite",
    "--on-spike": "train.spike",
    "--fsdp": "train.fsdp",
}

#: Flag -> other spelling that `transformers` users type.
ALIASES = {"--lr": "--learning-rate", "--save-every": "--save-steps"}

#: Names from `transformers`, `peft` and `trl` -> dotted setting, for the hint to an unknown flag.
KNOWN_ELSEWHERE = {
    "eval_steps": "train.eval_every",
    "gradient_accumulation_steps": "train.grad_accum",
    "logging_steps": "train.log_every",
    "lora_r": "lora.r",
    "lr_scheduler_type": "train.schedule",
    "max_seq_length": "data.max_length",
    "max_steps": "train.steps",
    "model_name_or_path": "base.model",
    "num_train_epochs": "train.epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "train.batch_size",
    "warmup_steps": "train.warmup",
}

#: Commands that take settings as ``section.key=value``.
WITH_OVERRIDES = ("train", "doctor", "plan", "eval", "predict")

#: Flags that an empty text switches off.
MAY_BE_EMPTY = ("--system",)

#: Dotted setting -> help text, for flags that set one entry of a table.
HELP = {"data.columns.text": "column of the text; default: found by name"}


def setting_field(dotted: str) -> Any:
    """Return the pydantic field of a dotted name; for an entry of a table such as data.columns.text, the table's field."""
    model: Any = RunConfig
    for part in dotted.split("."):
        field = model.model_fields[part]
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
    return field


def _flag_type(annotation: Any) -> type:
    """Return int, float or str: the type to which a flag's text is converted before the settings check it."""
    types = plain_types(annotation)
    if float in types:
        return float
    return int if int in types and str not in types else str


def with_settings(
    flags: dict[str, str], defaults: dict[str, Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add flags to a command, which receives those that were set as ``settings``, a dict of dotted names.

    Args:
        flags: Flag -> dotted setting.
        defaults: Dotted setting -> default of this command, shown in its help.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        names = {flag.strip("-").replace("-", "_"): (flag, dotted) for flag, dotted in flags.items()}

        def wrapper(**values: Any) -> Any:
            given = {dotted: _value(dotted, values.pop(name)) for name, (_, dotted) in names.items()}
            return command(settings={key: value for key, value in given.items() if value is not None}, **values)

        parameters = inspect.signature(command, eval_str=True).parameters.values()
        kept = [parameter for parameter in parameters if parameter.name != "settings"]
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
    is_switch = field.annotation is bool
    help_text = description + ("" if default in (None, {}) or is_switch else f"  [default: {default}]")
    metavar = {int: "INT", float: "NUMBER"}.get(_flag_type(field.annotation), "TEXT")
    spellings = [flag, *([ALIASES[flag]] if flag in ALIASES else [])]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(
            None, *spellings, help=help_text, show_default=False, metavar=None if is_switch else metavar
        ),
        annotation=bool | None if is_switch else str | None,
    )


def _value(dotted: str, text: str | bool | None) -> Any:
    """Convert a flag's text to a number if the setting is one; other text is refused by the check of the settings."""
    number = _flag_type(setting_field(dotted).annotation)
    if text is None or isinstance(text, bool) or number is str:
        return text
    try:
        return number(text)
    except ValueError:
        return text


def base_settings(settings: dict[str, Any]) -> BaseSettings:
    """Return the base section of dotted settings."""
    return read_run(None, values={key: value for key, value in settings.items() if key.startswith("base.")}).base


def read_overrides(
    overrides: list[str] | None, settings: dict[str, Any], sections: tuple[str, ...] = ("base", "data", "task")
) -> RunConfig:
    """Return the settings of a command that has no YAML file: from flags, then from overrides.

    Args:
        overrides: Words of the form ``section.key=value``.
        settings: Settings set by flags, by dotted name.
        sections: Sections that the command uses.

    Raises:
        ConfigError: A word is no override, or of another section.
    """
    for word in overrides or []:
        name, equals, _ = word.partition("=")
        section, dot, _ = name.strip().partition(".")
        if not (equals and dot) or section not in sections:
            allowed = ", ".join(f"{each}.*" for each in sections)
            raise ConfigError(f"{word!r} is no setting of this command, expected {allowed}", "write section.key=value")
    return read_run(None, overrides or (), settings)


def read_data_settings(
    overrides: list[str] | None, settings: dict[str, Any], eval_fraction: float | None, *, needs_data: bool
) -> RunConfig:
    """Return the settings of a command that measures on data, or on the part of it that a run holds out.

    Args:
        overrides: Words of the form ``section.key=value``.
        settings: Settings set by flags, by dotted name.
        eval_fraction: Share of the rows that the run holds out; None: all rows are measured.
        needs_data: Whether the command does nothing without data.

    Raises:
        ConfigError: A share is given without data, or see :func:`read_overrides`.
        DataError: There is no data.
    """
    chosen = {} if eval_fraction is None else {"data.eval_fraction": eval_fraction}
    config = read_overrides(overrides, {**settings, **chosen})
    if needs_data and not config.data.path:
        raise DataError("no data to evaluate on", "give --data FILE")
    if eval_fraction is not None and not config.data.path:
        raise ConfigError("--eval-fraction chooses rows of the data, and there is no --data", "give --data FILE")
    return config


def bounded(kind: Any) -> Callable[..., Any]:
    """Return a typer callback that checks the value of a flag against a type with bounds, such as ``Seed``."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is None:
            return None
        try:
            return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            wish = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise ConfigError(
                f"{param.opts[0]} = {value}: expected {wish}", f"{param.opts[0]} is: {_help(param)}"
            ) from None

    return check


def check_file(path: Path) -> None:
    """Check that there is a file to read texts from.

    Raises:
        DataError: There is none.
    """
    if not is_file(path):
        found = "is a folder" if is_dir(path) else "does not exist"
        raise DataError(f"{path} {found}, expected a file with texts", "give a file with one text per line, or a table")


def parse_and_call(command: Callable[..., Any], name: str, words: list[str]) -> int | None:
    """Parse ``words`` with typer, check every text that they hold, and call the command.

    Raises:
        ConfigError: A text is empty, or no file in UTF-8 can hold it.
    """
    parser = typer_command(command)
    for param in parser.params:
        param.callback = _text_checked(param.callback)
    return parser.main(args=words, prog_name=name, standalone_mode=False)


def _text_checked(callback: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return the callback of a flag or argument that checks its text, each one if it is repeated, before ``callback``."""

    def check(context: Any, param: Any, value: Any) -> Any:
        for text in value if isinstance(value, (list, tuple)) else [value]:
            given = str(text) if isinstance(text, Path) else text
            empty = given == "" and param.opts[0] in MAY_BE_EMPTY
            if isinstance(given, str) and not empty and (wish := text_error(given)):
                raise ConfigError(
                    f"{param.opts[0]} = {given!r}: expected {wish}", f"{param.opts[0]} is: {_help(param)}"
                )
        return callback(context, param, value) if callback else value

    return check


def _help(param: Any) -> str:
    """Return the help of a flag or argument, without its default."""
    return str(param.help or param.name).partition("  [default: ")[0]


def typer_command(command: Callable[..., Any]) -> Any:
    """Return the click command that typer makes of a function."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["--help", "-h"]})(command)
    return typer.main.get_command(app)


def usage_message(error: Any) -> str:
    """Return the message of a usage error in the form of our own: lower case, no period."""
    text: str = error.format_message().partition("\n")[0].rstrip(".")
    return text[:1].lower() + text[1:]


def usage_hint(error: Any, command: str) -> str:
    """Return the hint to a usage error: for an unknown flag the setting that it probably means, where the command has it."""
    if not hasattr(error, "possibilities"):  # only an unknown flag has possibilities
        return f"lorakeet {command} --help"
    known = {dotted.rpartition(".")[2]: dotted for dotted in setting_names(RunConfig)} | KNOWN_ELSEWHERE
    known |= {flag.strip("-").replace("-", "_"): dotted for flag, dotted in TRAIN_FLAGS.items()}
    dotted = known.get(error.option_name.strip("-").replace("-", "_"))
    flags = {setting: flag for flag, setting in TRAIN_FLAGS.items()} if command == "train" else {}
    if dotted in flags:
        return f"use {flags[dotted]}"
    if dotted and command in WITH_OVERRIDES:
        return f"it is the setting {dotted}: add {dotted}=VALUE"
    if dotted:
        return f"{dotted} is a setting of `lorakeet train`; `lorakeet {command} --help` lists the flags of {command}"
    return f"lorakeet {command} --help"
