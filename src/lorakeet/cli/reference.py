"""The reference pages, written from the code: ``python -m lorakeet.cli.reference docs/reference``.

``commands.md`` is made of the very options that the shell parses, ``config.md`` of the settings' schema. A test
compares the committed pages with these, so neither can fall behind.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from lorakeet.cli import COMMANDS, usage
from lorakeet.cli.options import TRAIN_FLAGS, typer_command
from lorakeet.config import RunConfig
from lorakeet.files import write_file

NOTE = "<!-- Written by `make docs` from the code; a change here is overwritten. -->"

#: The settings' types as JSON schema names them -> as the pages do.
TYPES = {"string": "text", "integer": "int", "number": "number", "boolean": "true or false"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤", "gt": ">"}


def pages() -> dict[str, str]:
    """File name -> text of each reference page."""
    return {"commands.md": commands_page(), "config.md": config_page()}


# -- commands.md ------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command: what it does, its examples, its arguments and options."""
    listed = "\n".join(f"- [`{name}`](#lorakeet-{name}): {what}" for name, what in COMMANDS.items())
    intro = (
        "Data goes to stdout, talk to stderr. A mistake of yours is one line and a hint, exit code 2; a fault of ours "
        "is exit code 1; Ctrl-C is 130. A traceback only with `--debug`."
    )
    top = f"{NOTE}\n\n# Commands\n\n{intro}\n\n{listed}\n\n```text\n{usage()}```"
    return "\n\n".join([top, *map(_command, COMMANDS)]) + "\n"


def _command(name: str) -> str:
    command = typer_command(getattr(importlib.import_module(f"lorakeet.cli.{name}"), name))
    text, _, examples = command.help.partition("\b\nexamples:\n")
    lines = "\n".join(line.strip() for line in examples.splitlines())
    rows = [_parameter(parameter) for parameter in command.params]
    head = f"## lorakeet {name}\n\n{text.strip()}\n\n```console\n{lines}\n```"
    return head + "\n\n" + _table(["", "default", ""], rows)


def _parameter(parameter: Any) -> list[str]:
    """How it is written, its default, what it means."""
    is_option = parameter.opts[0].startswith("-")
    value = parameter.metavar or ("" if getattr(parameter, "is_flag", False) else "VALUE")
    if is_option:
        written = f"`{parameter.opts[0]}{f' {value}' if value else ''}`"
        written += "".join(f", `{other}`" for other in [*parameter.opts[1:], *parameter.secondary_opts])
    else:
        written = f"`{parameter.metavar or parameter.name.upper()}`"
    text, _, told = (parameter.help or "").partition("  [default: ")
    default = told.removesuffix("]") or ("" if parameter.default in (None, False) else str(parameter.default))
    return [written, "needed" if parameter.required else f"`{default}`" if default else "", text]


# -- config.md --------------------------------------------------------------------------------------------------------


def config_page() -> str:
    """Every setting of a run, by section."""
    schema = RunConfig.model_json_schema()
    flags = {dotted: flag for flag, dotted in TRAIN_FLAGS.items()}
    intro = (
        "What a run's YAML file may say, and `lorakeet train section.key=value` on the command line. "
        "The settings of `lora` are the arguments of `LoraConfig` too. Unknown keys are refused, with the nearest name."
    )
    parts = [f"{NOTE}\n\n# Settings\n\n{intro}"]
    single = {}
    for name, field in schema["properties"].items():
        if "$ref" not in field:
            single[name] = field
            continue
        section = schema["$defs"][field["$ref"].rpartition("/")[2]]
        rows = [_setting(key, f"{name}.{key}", inner, flags) for key, inner in section["properties"].items()]
        parts.append(f"## {name}\n\n{section['description']}\n\n{_table(SETTING_HEAD, rows)}")
    rows = [_setting(name, name, field, flags) for name, field in single.items()]
    parts.append(f"## Beside the sections\n\n{_table(SETTING_HEAD, rows)}")
    return "\n\n".join(parts) + "\n"


SETTING_HEAD = ["setting", "flag", "type", "default", ""]


def _setting(key: str, dotted: str, field: dict[str, Any], flags: dict[str, str]) -> list[str]:
    flag = f"`{flags[dotted]}`" if dotted in flags else ""
    return [f"`{key}`", flag, _type(field), _default(field.get("default")), field["description"]]


def _default(value: Any) -> str:
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(field: dict[str, Any]) -> str:
    """A schema in a few words, such as ``int > 0``, ``a list of text``, ``8, 16, 32``."""
    if "anyOf" in field:
        kinds = [_type(kind) for kind in field["anyOf"] if kind.get("type") != "null"]
        kinds = ["number"] if kinds == ["int", "number"] else kinds
        return " or ".join(kinds) + _bounds(field)
    if choices := field.get("enum", [field["const"]] if "const" in field else []):
        return ", ".join(f"`{choice}`" for choice in choices)
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if field["type"] == "object":
        return f"name: {_type(field['additionalProperties'])}"
    return TYPES[field["type"]] + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    return "".join(f" {sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells)


def main(folder: str) -> None:
    """Write every page into ``folder``."""
    for name, text in pages().items():
        with write_file(Path(folder) / name) as aside:
            aside.write_text(text, encoding="utf-8")
        print(Path(folder) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
