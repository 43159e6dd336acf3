"""Nested values from a YAML file and from ``section.key=value`` overrides; :mod:`lorakeet.config` checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lorakeet.errors import ConfigError
from lorakeet.security.shown import cut
from lorakeet.security.yaml_loader import BoundedLoader
from lorakeet.text_files import NotTextError, read_text

#: File name suffixes of a run's settings; any other file, and a list, is taken for data that was given in the wrong place.
SUFFIXES = (".yaml", ".yml")


#: Characters of an override that a message shows.
_SHOWN = 120
_NO_SETTINGS = "give the YAML file of a run, for example one with the line: lora: {r: 32}"


class _DuplicateKeyError(yaml.YAMLError):
    """A mapping has the same key twice, of which YAML would silently keep the last."""


class _Loader(BoundedLoader):
    """Safe YAML loader that refuses duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and first.setdefault(key, line) != line:
                raise _DuplicateKeyError(f"key {key!r} of line {first[key]} is given again in line {line}")
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: It is not YAML, or a value does not fit its tag, or it is nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # the constructors of dates and of tagged values raise many kinds
        raise yaml.YAMLError(f"a value cannot be read ({error})") from None


def read_tree(path: str | Path, sections: list[str]) -> dict[str, Any]:
    """Read a YAML file of settings.

    Args:
        path: The file.
        sections: Names that its top level may have, for the error message.

    Returns:
        The nested values, not yet checked.

    Raises:
        ConfigError: The file is missing, is no YAML mapping, or has the same key twice.
    """
    suffix = Path(path).suffix.lower()
    as_data = f"if {path} is data to train on, give it as --data {path}"
    hint = None if suffix in SUFFIXES else as_data
    try:
        tree = _load(read_text(path))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint or "give the YAML file of a run, or only flags"
        ) from None
    except _DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error}", "keep one of the two") from None
    except NotTextError as error:
        raise ConfigError(f"{path} is not YAML: {error.message}", hint or error.hint) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}", hint or _NO_SETTINGS) from None
    if not isinstance(tree, dict):
        hint = as_data if isinstance(tree, list) else hint
        kind = "nothing" if tree is None else type(tree).__name__
        raise ConfigError(f"{path} holds {kind}, expected the sections {', '.join(sections)}", hint or _NO_SETTINGS)
    return tree


def parse_override(override: str) -> tuple[str, Any]:
    """Return the dotted name and the value of ``section.key=value``; the value is YAML.

    Raises:
        ConfigError: There is no ``=``, or the value is not YAML.
    """
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override[:_SHOWN]!r} has no '='", "write it as section.key=value, e.g. lora.r=32")
    try:
        return name.strip(), _scalar(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"the value of override {cut(override, _SHOWN)!r} is not YAML",
            f"""put the value in quotes: '{cut(name.strip(), _SHOWN)}="..."'""",
        ) from None


def _scalar(text: str) -> Any:
    """Return a YAML value; ``1e-4`` is a number here, although YAML 1.1 reads it as text."""
    value = _load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted name in nested mappings, in place; missing sections are created.

    Raises:
        ConfigError: A section of the name holds a plain value.
    """
    *sections, key = dotted.split(".")
    for section in sections:
        inner = tree[section] = {} if tree.get(section) is None else tree[section]
        if not isinstance(inner, dict):
            shown = cut(repr(inner), _SHOWN)
            raise ConfigError(f"{cut(section, _SHOWN)!r} is {shown}, expected a section with keys of its own")
        tree = inner
    tree[key] = value
