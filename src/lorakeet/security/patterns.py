"""Regular expressions of strangers, matched in bounded time.

The module ``re`` tries all ways to divide a text among repeats, and ``(a+)+`` has exponentially many. A pattern with several
repeats is matched by the package ``regex``, which reads the same patterns and stops after a time.
"""

from __future__ import annotations

import functools
import re
from typing import Any

#: Seconds that one match may take; the slowest benign one takes a thousandth.
MOST_SECONDS = 0.5
_REPEAT = re.compile(r"[*+}]")


class SlowPatternError(ValueError):
    """A match takes too long."""


def fullmatch(pattern: str, text: str) -> Any:
    """Return the match of all of ``text``, or None.

    Raises:
        SlowPatternError: It takes longer than :data:`MOST_SECONDS`.
    """
    return _match("fullmatch", pattern, text)


def match(pattern: str, text: str) -> Any:
    """Return the match at the beginning of ``text``, or None.

    Raises:
        SlowPatternError: It takes longer than :data:`MOST_SECONDS`.
    """
    return _match("match", pattern, text)


def _match(how: str, pattern: str, text: str) -> Any:
    compiled, has_clock = _compiled(pattern)
    if not has_clock:
        return getattr(compiled, how)(text)
    try:
        return getattr(compiled, how)(text, timeout=MOST_SECONDS)
    except TimeoutError:
        raise SlowPatternError(f"{pattern[:80]!r} takes too long to match: it has repeats inside of repeats") from None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> tuple[Any, bool]:
    """Return a compiled pattern, and whether its matches take a timeout."""
    if len(_REPEAT.findall(pattern)) < 2:
        return re.compile(pattern), False
    import regex

    try:
        return regex.compile(pattern), True
    except regex.error:
        return re.compile(pattern), False
