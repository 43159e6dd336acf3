"""JSON files of strangers: read with limits on size and nesting, each key once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorakeet.security.paths import irregular

#: Bytes of the largest file; settings and lists of tensors are far smaller.
LARGEST = 1 << 25
#: Levels of the deepest nesting; code that walks a value by recursion can do ten times as many.
DEEPEST = 100
#: Digits of the longest integer; fp64, which arithmetic with other numbers needs, holds 308.
LONGEST_INTEGER = 300


class JsonError(ValueError):
    """A file is no JSON that is read here; the message says why, without the path."""


def read_json(path: str | Path, largest: int = LARGEST) -> Any:
    """Return the value in a JSON file.

    Args:
        path: The file.
        largest: Bytes that it may have.

    Raises:
        OSError: It cannot be read.
        JsonError: It is no regular file, too large, no UTF-8, no JSON, nested too deeply, or has a key twice.
    """
    path = Path(path)
    if kind := irregular(path):
        raise JsonError(f"it is {kind}, expected a file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise JsonError(f"it has more than {largest / 1e6:,.0f} MB, expected less")
    return parse_json(content)


def read_object(path: str | Path, largest: int = LARGEST) -> dict[str, Any]:
    """Return the object in a JSON file of at most ``largest`` bytes.

    Raises:
        OSError: It cannot be read.
        JsonError: As :func:`read_json`, or it holds no object.
    """
    value = read_json(path, largest)
    if not isinstance(value, dict):
        raise JsonError(f"it holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        JsonError: It is no UTF-8, no JSON, nested too deeply, or has a key twice with two values, or a very long integer.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_once, parse_int=_integer)
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except ValueError as error:
        raise JsonError(str(error)) from None
    if _is_deep(value):
        raise JsonError("it is nested too deeply")
    return value


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise JsonError(f"it has an integer of {len(digits):,} digits, expected at most {LONGEST_INTEGER}")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] is not value and found[key] != value:
                raise JsonError(f"key {key[:80]!r} is given twice, with two values")
    return found


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested in more than :data:`DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return False
    return True


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
