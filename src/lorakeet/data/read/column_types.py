"""What columns hold: their types, from the values one by one or from the schema of an arrow table.

Types are written as Python writes them: ``str``, ``int``, ``list[str]``, ``dict``, ``null`` (no value at all), or
several joined by `` or ``. What is inside of a ``dict`` is a column too, named with a dot: ``answers.text``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
from pyarrow import types as arrow

_MOST_INNER = 32  # names inside of one column; a value with more is no record but a dictionary
_INT = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)
_FLOAT = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?\s*", re.ASCII)


class TypeNames:
    """The types of columns, gathered row by row in constant memory.

    Args:
        numbers: values are strings that may be meant as numbers, as in a CSV file: a column whose every field reads
            as one is ``int`` or ``float``.
    """

    def __init__(self, numbers: bool = False) -> None:
        self._numbers = numbers
        self._found: dict[str, set[str]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Take one row into account."""
        for name, value in values.items():
            self._add(name, value)
            if isinstance(value, dict) and len(value) <= _MOST_INNER:
                for inner, held in value.items():
                    self._add(f"{name}.{inner}", held)

    def names(self) -> dict[str, str]:
        """The type of each column, in the order of their first appearance."""
        return {name: self._joined(kinds) for name, kinds in self._found.items()}

    def _add(self, name: str, value: Any) -> None:
        kinds = self._found.setdefault(name, set())
        if value is not None and (kind := self._kind(value)):
            kinds.add(kind)

    def _kind(self, value: Any) -> str:
        if self._numbers and isinstance(value, str):
            return reads_as(value)
        if isinstance(value, list):
            return f"list[{self._kind(value[0])}]" if value else "list"
        return "null" if value is None else type(value).__name__

    def _joined(self, kinds: set[str]) -> str:
        if self._numbers and len(kinds) > 1:
            return "float" if kinds == {"int", "float"} else "str"
        if any(kind.startswith("list[") for kind in kinds):
            kinds = kinds - {"list"}  # an empty one tells nothing
        return " or ".join(sorted(kinds)) or "null"


def reads_as(text: str) -> str:
    """What a CSV field is: ``int``, ``float``, ``str``, or nothing where it is empty."""
    return "int" if _INT.fullmatch(text) else "float" if _FLOAT.fullmatch(text) else "str" if text else ""


def schema_types(schema: pyarrow.Schema) -> dict[str, str]:
    """The types of the columns of ``schema``; labels that it knows by name are ``str``."""
    named, types = class_names(schema), {}
    for column in schema:
        held = _type_name(column.type)
        types[column.name] = held.replace("int", "str") if column.name in named else held
        if arrow.is_struct(column.type):
            types |= {f"{column.name}.{inner.name}": _type_name(inner.type) for inner in column.type}
    return types


def _type_name(kind: pyarrow.DataType) -> str:
    if arrow.is_dictionary(kind):
        return _type_name(kind.value_type)
    if arrow.is_list(kind) or arrow.is_large_list(kind) or arrow.is_fixed_size_list(kind):
        return f"list[{_type_name(kind.value_type)}]"
    known = {
        "str": arrow.is_string(kind) or arrow.is_large_string(kind) or arrow.is_string_view(kind),
        "int": arrow.is_integer(kind),
        "float": arrow.is_floating(kind),
        "bool": arrow.is_boolean(kind),
        "null": arrow.is_null(kind),
        "dict": arrow.is_struct(kind),
    }
    return next((name for name, is_it in known.items() if is_it), str(kind))


def class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Names of the classes by column, where the library ``datasets`` has written them (its ``ClassLabel``)."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    found = {}
    for name, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[name] = list(inner["names"])
    return found


def records(batch: pyarrow.RecordBatch, named: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """The rows of ``batch``, a few at a time, with names in place of the numbers of classes (-1: none, so null)."""
    for start in range(0, batch.num_rows, 256):
        for record in batch.slice(start, 256).to_pylist():
            for name, names in named.items():
                if name in record:
                    record[name] = _class_name(record[name], names)
            yield record


def _class_name(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_name(inner, names) for inner in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def held(values: Mapping[str, Any], column: str) -> Any:
    """The value of ``column``, which may be inside of another; None where there is none."""
    if column in values or "." not in column:
        return values.get(column)
    outer, _, inner = column.partition(".")
    value = values.get(outer)
    return held(value, inner) if isinstance(value, dict) else None


def outer(columns: Collection[str] | None, known: Sequence[str]) -> list[str]:
    """Those of the ``known`` columns of a table in which ``columns`` are: ``answers`` for ``answers.text``; or all."""
    if columns is None:
        return list(known)
    names = dict.fromkeys(name if name in known else name.partition(".")[0] for name in columns)
    return [name for name in known if name in names]
