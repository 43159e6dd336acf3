"""The end of a JSON object in a text that comes in pieces."""

from __future__ import annotations


class JsonExtent:
    """Extent of a JSON object, by its brackets and strings alone; whether it is valid is not asked."""

    def __init__(self, depth: int = 0) -> None:
        """Begin before an object.

        Args:
            depth: Brackets that were opened before, in text that is not read again.
        """
        self._depth = depth
        self._in_string = self._is_escaped = False

    def end(self, text: str) -> int | None:
        """Read a further piece, and return the index behind the object's last bracket; None: more belongs to it."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif character == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                self._is_escaped = character == "\\"
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None
