"""The errors a person can do something about.

Each carries one sentence that says what was sought, what was found and what was expected, and, where there is one,
a hint with the next thing to type. The command line prints the two lines and leaves with exit code 2; a traceback
appears only with ``--debug``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorakeetError(Exception):
    """Base of all errors that Lorakeet raises on purpose.

    Args:
        message: One sentence: what, got, expected.
        hint: What to do about it, if we know.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(LorakeetError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class TargetError(ConfigError):
    """``target_modules`` (or a sibling) match nothing, or only a part of what was named."""


class BaseModelError(LorakeetError, ValueError):
    """The base model cannot be found, read or used as asked."""


class DataError(LorakeetError, ValueError):
    """The data cannot be found, read or learned from."""


class AdapterError(LorakeetError, ValueError):
    """An adapter on disk or in memory is not what it should be."""


class MergeError(LorakeetError, RuntimeError):
    """A merged model does not compute what the unmerged one does, or a merge is not possible."""


class TrainingError(LorakeetError, RuntimeError):
    """A run cannot start, or must not go on."""


class OutputError(LorakeetError, OSError):
    """A place to write to is not writable, or already holds something."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names of ``known`` most like ``word``, best first."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.5)
    return close or [name for name in names if word.lower() in name.lower() or name.lower() in word.lower()][:count]


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint with the nearest known names, or None when nothing is near."""
    close = nearest(word, known)
    return f"did you mean {', '.join(map(repr, close))}?" if close else None
