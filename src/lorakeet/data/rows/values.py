"""Values of one record by role, checked for their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakeet.data.read.column_types import ColumnType, reads_as, value_of
from lorakeet.data.read.record import FaultError

_EXPECTED = {"int": "a whole number", "float": "a number", "str": "a string"}


class Values:
    """Values of one record by role; what does not have the type of its role raises a :class:`FaultError`.

    Args:
        values: The record, by column.
        columns: Role -> column.
        types: Role -> type, of the roles whose type the source decides (labels, tags).
    """

    def __init__(
        self, values: Mapping[str, Any], columns: Mapping[str, str], types: Mapping[str, ColumnType] | None = None
    ) -> None:
        self._values, self.columns, self.types = values, columns, types or {}

    def __contains__(self, role: str) -> bool:
        return role in self.columns

    def raw(self, role: str) -> Any:
        """Return the value as found; None if there is none."""
        column = self.columns.get(role)
        return None if column is None else value_of(self._values, column)

    def text(self, role: str) -> str | None:
        """Return a string, or None."""
        value = self.raw(role)
        if value is not None and not isinstance(value, str):
            raise self.wrong_type(role, value, "a string")
        return None if value is None else self.whole(role, value)

    def whole(self, role: str, text: str) -> str:
        """Return ``text``; refuse one with half a character, since JSON can hold half of a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"holds half a character, \\u{ord(text[error.start]):04x}"
            raise self.fault(role, half, code="half_character") from None
        return text

    def strings(self, role: str) -> list[Any] | None:
        """Return a list; a string is split at its blanks, as a CSV file would write a list."""
        value = self.raw(role)
        if isinstance(value, str):
            return value.split() or None
        if value is not None and not isinstance(value, list):
            raise self.wrong_type(role, value, "a list")
        return value

    def scalar(self, role: str, value: Any, base: str) -> Any:
        """Return ``value`` as ``base`` (``str``, ``int`` or ``float``); a CSV file writes numbers as strings."""
        if base == "str" and isinstance(value, str):
            return self.whole(role, value)
        number = float(value) if isinstance(value, str) and reads_as(value) in ("int", base) else value
        in_range = isinstance(number, (int, float)) and abs(number) < 2**53
        if base == "float" and in_range:
            return float(number)
        if base == "int" and in_range and number == int(number):
            return int(number)
        expected = f"{_EXPECTED.get(base, base)} as in the other rows"
        raise self.fault(role, f"holds {value!r:.40}, expected {expected}")

    def wrong_type(self, role: str, value: Any, expected: str) -> FaultError:
        """Return the error for a ``value`` of a wrong type in the column of ``role``."""
        return self.fault(role, f"holds {type(value).__name__}, expected {expected}")

    def fault(self, role: str, phrase: str, hint: str | None = None, *, code: str = "wrong_type") -> FaultError:
        """Return the error for a fault in the column of ``role``.

        Args:
            role: A role that has a column.
            phrase: What is wrong with the column: ``holds int, expected a string``.
            hint: How to correct it, if known.
            code: Code of the fault.
        """
        return FaultError(code, f"column {self.columns[role]!r} {phrase}", hint)
