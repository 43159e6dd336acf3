"""Types of columns, inferred from values one record at a time, or read from the schema of an arrow table.

A column is named by its key. The members of a ``dict`` are columns too, named with a dot: ``answers.text``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import types as arrow

_MAX_MEMBERS = 32  # members of a dict that count as columns; a larger one is a lookup table, not a record
_INT = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)
_FLOAT = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?\s*", re.ASCII)


@dataclass(frozen=True, order=True)
class ColumnType:
    """Type of the values of a column.

    Attributes:
        base: Python's name of the type (``str``, ``int``, ``dict``, ...; ``null``: no value at all), or arrow's name
            where Python has no such type. Of a list: the type of its members, empty where no list has a member.
        is_list: Whether the values are lists of ``base``.
    """

    base: str
    is_list: bool = False

    def __str__(self) -> str:
        if not self.is_list:
            return self.base
        return f"list[{self.base}]" if self.base else "list"


STR, INT, FLOAT, NULL = (ColumnType(name) for name in ("str", "int", "float", "null"))
STR_LIST, INT_LIST = ColumnType("str", is_list=True), ColumnType("int", is_list=True)
EMPTY_LIST = ColumnType("", is_list=True)

#: Types that occur in one column: usually one, none where every value is null.
ColumnTypes = frozenset[ColumnType]


def type_names(types: Iterable[ColumnType]) -> str:
    """Return ``types`` as a phrase: ``int or list[str]``."""
    return " or ".join(sorted(map(str, types))) or "null"


def unify(types: Iterable[ColumnType], numbers: bool = False) -> ColumnTypes:
    """Return the distinct ``types`` without nulls, and without empty lists where another list shows what they hold.

    Args:
        types: Types of the values of one column.
        numbers: The values are fields of a CSV file: their types become one, ``str`` unless all are numbers.
    """
    found = frozenset(types) - {NULL}
    if numbers and len(found) > 1:
        return frozenset({FLOAT if found == {INT, FLOAT} else STR})
    if any(one.is_list and one.base for one in found):
        found -= {EMPTY_LIST}
    return found


class TypeInference:
    """Infers the types of columns record by record, in constant memory.

    Args:
        numbers: Values are strings that may be meant as numbers, as in a CSV file: a column whose every field reads
            as one is ``int`` or ``float``.
    """

    def __init__(self, numbers: bool = False) -> None:
        self._numbers = numbers
        self._found: dict[str, set[ColumnType]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Take one record into account."""
        for name, value in values.items():
            self._add(name, value)
            if isinstance(value, dict) and len(value) <= _MAX_MEMBERS:
                for inner, member in value.items():
                    self._add(f"{name}.{inner}", member)

    def types(self) -> dict[str, ColumnTypes]:
        """Return the types of each column, in the order of their first appearance."""
        return {name: unify(found, self._numbers) for name, found in self._found.items()}

    def _add(self, name: str, value: Any) -> None:
        found = self._found.setdefault(name, set())
        if value is not None and (one := self._type_of(value)) is not None:
            found.add(one)

    def _type_of(self, value: Any) -> ColumnType | None:
        if isinstance(value, str):
            return _FIELD_TYPES[reads_as(value)] if self._numbers else STR
        if isinstance(value, list):
            return ColumnType(str(self._type_of(value[0]) or ""), is_list=True) if value else EMPTY_LIST
        return NULL if value is None else ColumnType(type(value).__name__)


#: Words for a number or a label that is missing, as data frames and spreadsheets write them.
MISSING = ("NaN", "nan", "NAN", "<NA>", "#N/A", "null", "NULL")
_FIELD_TYPES = {"int": INT, "float": FLOAT, "str": STR, "": None}


def reads_as(text: str) -> str:
    """Return the type that a CSV field reads as: ``int``, ``float`` or ``str``; empty for one that is empty or missing."""
    if _INT.fullmatch(text):
        return "int"
    return "float" if _FLOAT.fullmatch(text) else "str" if text and text.strip() not in MISSING else ""


def schema_types(schema: pyarrow.Schema) -> dict[str, ColumnTypes]:
    """Return the types of the columns of ``schema``; classes whose names it holds count as ``str``."""
    named = class_names(schema)
    types: dict[str, ColumnTypes] = {}
    for column in schema:
        found = _arrow_type(column.type)
        if column.name in named and found.base == "int":
            found = ColumnType("str", found.is_list)
        types[column.name] = unify([found])
        if arrow.is_struct(column.type):
            types |= {f"{column.name}.{inner.name}": unify([_arrow_type(inner.type)]) for inner in column.type}
    return types


def _arrow_type(type: pyarrow.DataType) -> ColumnType:
    if arrow.is_dictionary(type):
        return _arrow_type(type.value_type)
    if arrow.is_list(type) or arrow.is_large_list(type) or arrow.is_fixed_size_list(type):
        return ColumnType(str(_arrow_type(type.value_type)), is_list=True)
    known = {
        "str": arrow.is_string(type) or arrow.is_large_string(type) or arrow.is_string_view(type),
        "int": arrow.is_integer(type),
        "float": arrow.is_floating(type),
        "bool": arrow.is_boolean(type),
        "null": arrow.is_null(type),
        "dict": arrow.is_struct(type),
    }
    return ColumnType(next((name for name, is_it in known.items() if is_it), str(type)))


def class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Return the names of the classes by column, where the library ``datasets`` has written them (``ClassLabel``)."""
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
    """Yield the rows of ``batch``, with class names in place of class numbers (-1, no class, becomes None).

    A table gives every object the members of all; those without a value are left out. Rows are converted 256 at a time,
    so that few are in memory at once.
    """
    nested = [column.name for column in batch.schema if _holds_objects(column.type)]
    for start in range(0, batch.num_rows, 256):
        for record in batch.slice(start, 256).to_pylist():
            for name, names in named.items():
                if name in record:
                    record[name] = _class_name(record[name], names)
            for name in nested:
                record[name] = without_null(record[name])
            yield record


def _holds_objects(type: pyarrow.DataType) -> bool:
    if arrow.is_list(type) or arrow.is_large_list(type) or arrow.is_fixed_size_list(type):
        return _holds_objects(type.value_type)
    return bool(arrow.is_struct(type))


def without_null(value: Any) -> Any:
    """Return ``value`` without the null members of its objects."""
    if isinstance(value, dict):
        return {name: without_null(inner) for name, inner in value.items() if inner is not None}
    return [without_null(inner) for inner in value] if isinstance(value, list) else value


def _class_name(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_name(inner, names) for inner in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def value_of(values: Mapping[str, Any], column: str) -> Any:
    """Return the value of ``column``, which may be a member of another; None where there is none."""
    if column in values or "." not in column:
        return values.get(column)
    outer, _, inner = column.partition(".")
    value = values.get(outer)
    return value_of(value, inner) if isinstance(value, dict) else None


def outer_columns(columns: Collection[str] | None, known: Sequence[str]) -> list[str]:
    """Return the ``known`` columns that contain ``columns`` (``answers`` for ``answers.text``); all, if None is given."""
    if columns is None:
        return list(known)
    names = dict.fromkeys(name if name in known else name.partition(".")[0] for name in columns)
    return [name for name in known if name in names]
