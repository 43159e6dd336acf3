"""Kinds of data: one registry of what rows of each kind hold, how records become rows, and who encodes them.

A kind is added by one :func:`register`; reading, column mapping, the doctor and the encoders ask the registry. The kinds
that Lorakeet has are registered in :mod:`lorakeet.data.encode.kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import datasets

from lorakeet.config import DataSettings, TaskName, TaskSettings
from lorakeet.data.read.column_types import STR, ColumnType, ColumnTypes
from lorakeet.data.read.record import Fault, FaultError, Location, Record
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.data.rows.values import Values
from lorakeet.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Role:
    """A part of a record.

    Attributes:
        names: Names of its column in lower case: the role's own first, which wins; two of the others are ambiguous.
        holds: Types that its column may have, as Python writes them (``list`` for any list).
        takes_rest: Without a column of these names, the only remaining column of strings is taken.
    """

    names: tuple[str, ...]
    holds: tuple[str, ...] = ("str",)
    takes_rest: bool = False

    def accepts(self, types: ColumnTypes) -> bool:
        """Whether a column of ``types`` may play this role."""
        return any(("list" if one.is_list else one.base) in self.holds for one in types) or (
            not types and "null" in self.holds
        )


def role(*names: str, holds: tuple[str, ...] = ("str",), takes_rest: bool = False) -> Role:
    """Build a role from the ``names`` of its column."""
    return Role(names, holds, takes_rest)


@dataclass(frozen=True)
class Roles:
    """Set of roles that makes a row of a kind.

    Attributes:
        required: Role -> what is known of its column.
        optional: The same, of roles that a record may lack.
        members_of: A column of dicts whose members are the required roles in their order, if it has exactly these.
        fits: Whether columns of these types are meant, by role; where names alone do not tell.
    """

    required: Mapping[str, Role]
    optional: Mapping[str, Role] = field(default_factory=dict)
    members_of: str | None = None
    fits: Callable[[Mapping[str, ColumnTypes]], bool] = lambda types: True

    @property
    def all(self) -> Mapping[str, Role]:
        """Roles, the required ones first."""
        return {**self.required, **self.optional}


@dataclass(frozen=True)
class Column:
    """A canonical column of a kind.

    Attributes:
        name: Its name; where :attr:`type` is a function or the column is optional, also the name of its role.
        type: Type of its values; or a function that gives it, of the types and the name of the source's column.
        required: A row without a value in it cannot be used.
        may_be_empty: A row with an empty text, white space or an empty list in it can be used.
        optional: The column is there only where the source has one for its role.
        is_text: It holds text that the doctor checks.
        in_content: Part of the text that decides between training and held-out part.
        is_answer: It holds the answer; rows that differ in nothing else contradict each other.
    """

    name: str
    type: ColumnType | Callable[[ColumnTypes, str], ColumnType] = STR
    required: bool = True
    may_be_empty: bool = False
    optional: bool = False
    is_text: bool = True
    in_content: bool = True
    is_answer: bool = False

    def is_missing(self, value: Any) -> bool:
        """Whether ``value`` is none."""
        return value is None or (isinstance(value, float) and math.isnan(value))

    def is_blank(self, value: Any) -> bool:
        """Whether ``value``, which is not missing, holds nothing that could be used."""
        if self.may_be_empty or not isinstance(value, (str, list)):
            return False
        return not value or (isinstance(value, str) and value.isspace())


class EncoderFactory(Protocol):
    """Makes the encoder of a kind for a task."""

    def __call__(
        self, layout: Layout, task: TaskSettings, settings: DataSettings, tokenizer: Any, labels: LabelSet | None
    ) -> Any:
        """Return an :class:`lorakeet.data.encode.encoder.Encoder` for rows of ``layout``.

        Raises:
            DataError: ``settings`` ask for what such rows do not have.
            BaseModelError: the tokenizer cannot do what the task needs.
        """


@dataclass(frozen=True)
class Kind:
    """A kind of data.

    Attributes:
        name: Its name, as reports have it.
        roles: Sets of roles that make a row of it; the first that fits is taken.
        columns: Its canonical columns.
        normalize: From a record's values to canonical columns; a column left out is null. None: every column is the text
            of the role of its name.
        encoders: Task that trains on such rows -> factory of its encoder.
        labels: The canonical column of labels (classes or tags), if it has one.
        asked: Roles of a row that a model is asked about: without its answer. None: a model is not asked about such rows.
        texts: All texts of a usable row; left out: those of its text columns.
    """

    name: str
    roles: tuple[Roles, ...]
    columns: tuple[Column, ...]
    normalize: Callable[[Values], dict[str, Any]] | None
    encoders: Mapping[TaskName, EncoderFactory]
    labels: str | None = None
    asked: Roles | None = None
    texts: Callable[[Row], Iterable[str]] | None = None

    def column(self, name: str) -> Column:
        """Return the canonical column ``name``."""
        return next(column for column in self.columns if column.name == name)

    def missing(self, row: Row) -> list[str]:
        """Return the columns that ``row`` has and that lack a value they need."""
        return [column.name for column in self._required if column.name in row and column.is_missing(row[column.name])]

    def blank(self, row: Row) -> list[str]:
        """Return the columns of ``row`` that need content and have none, of a row that misses nothing."""
        return [column.name for column in self._required if column.name in row and column.is_blank(row[column.name])]

    def is_usable(self, row: Row) -> bool:
        """Whether a sample can be made of a canonical row: it has all that is required, and none of it is blank."""
        return not self.missing(row) and not self.blank(row)

    def texts_of(self, row: Row) -> list[str]:
        """Return all texts of a usable row."""
        if self.texts is not None:
            return list(self.texts(row))
        values = [row.get(name) for name in self._text_columns]
        return [
            text for value in values for text in (value if isinstance(value, list) else [value]) if text is not None
        ]

    def answers_of(self, row: Row) -> list[Any]:
        """Return the values of a row that another row with the same texts would contradict."""
        return [row[column.name] for column in self.columns if column.is_answer]

    def content_columns(self) -> list[str]:
        """Return the columns whose text decides between training and held-out part."""
        return [column.name for column in self.columns if column.in_content]

    def content(self, row: Row) -> str:
        """Return the text that decides between training and held-out part; equal texts never straddle the split."""
        values = (row.get(name) for name in self.content_columns())
        return "\n".join(" ".join(value) if isinstance(value, list) else value or "" for value in values)

    @cached_property
    def _required(self) -> list[Column]:
        return [column for column in self.columns if column.required]

    @cached_property
    def _text_columns(self) -> list[str]:
        return [column.name for column in self.columns if column.is_text]


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Add a kind of data. For its tasks it is tried before the kinds that were registered earlier.

    Raises:
        ValueError: there is a kind of this name.
    """
    if kind.name in _KINDS:
        raise ValueError(f"there is a kind of data {kind.name!r} already")
    _KINDS[kind.name] = kind
    return kind


def unregister(name: str) -> None:
    """Remove the kind ``name``."""
    del _KINDS[name]


def find_kind(name: str) -> Kind:
    """Return the kind ``name``."""
    return _KINDS[name]


def all_kinds() -> list[Kind]:
    """Return all kinds, the last registered first."""
    return list(reversed(_KINDS.values()))


def kinds_for(task: TaskName) -> list[Kind]:
    """Return the kinds that ``task`` trains on, in the order in which they are tried."""
    return [kind for kind in all_kinds() if task in kind.encoders]


@dataclass(frozen=True)
class Layout:
    """The kind of a source's rows, and which of its columns plays which role.

    Attributes:
        kind: Name of the kind.
        columns: Role -> column of the source.
        types: Canonical column -> type, of the columns whose type the source decides (labels, tags).
        absent: Optional columns that only other sources have: null in every row of this one, which cannot be used.
    """

    kind: str
    columns: Mapping[str, str]
    types: Mapping[str, ColumnType] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    @cached_property
    def column_names(self) -> tuple[str, ...]:
        """The canonical columns that rows of this layout have."""
        columns, named = find_kind(self.kind).columns, self.columns.keys() | self.absent
        return tuple(column.name for column in columns if not column.optional or column.name in named)

    def features(self) -> datasets.Features:
        """Return the canonical columns with their types."""
        kind = find_kind(self.kind)
        types = {name: kind.column(name).type for name in self.column_names}
        return datasets.Features(
            {
                name: _feature(type if isinstance(type, ColumnType) else self.types.get(name, STR))
                for name, type in types.items()
            }
        )


def _feature(type: ColumnType) -> Any:
    value = datasets.Value({"int": "int64", "float": "float64"}.get(type.base, "string"))
    return datasets.List(value) if type.is_list else value


class RowError(DataError):
    """A record does not hold what its layout needs.

    Attributes:
        location: Where the record is.
        fault: Its fault.
    """

    def __init__(self, location: Location, fault: Fault) -> None:
        super().__init__(f"{location.phrase}: {fault.message}", fault.hint)
        self.location, self.fault = location, fault


def canonical(record: Record, layout: Layout) -> dict[str, Any]:
    """Return the canonical columns of a record; null where it holds nothing or has a fault.

    Raises:
        RowError: a value is not what its role needs.
    """
    row: dict[str, Any] = dict.fromkeys(layout.column_names)
    values = record.values
    if values is None:
        return row
    normalize = find_kind(layout.kind).normalize
    try:
        if normalize is not None:
            return row | normalize(Values(values, layout.columns, layout.types))
        for role, column in layout.columns.items():
            if role not in row:
                continue
            value = values.get(column)
            if type(value) is str and value.isascii():  # the plain case, which needs no further check
                row[role] = value
            else:
                row[role] = Values(values, layout.columns).text(role)
    except FaultError as error:
        raise RowError(record.location, error.fault) from None
    return row
