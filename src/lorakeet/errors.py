"""Errors that the user can act on.

Each has the families that code written for ``peft`` expects in its ``except``: ValueError, TypeError, RuntimeError, KeyError.
Each has a message, one sentence: what, got, expected. Most have a hint: the next thing to type. Neither ends with a
period. The command line prints both, one line each, and exits with code 2; ``--debug`` adds the traceback.
``tests/test_error_messages.py`` checks the form of every message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lorakeet.security.shown import for_people


class LorakeetError(Exception):
    """Base class of the errors that Lorakeet raises on purpose; secrets in their texts are hidden.

    Args:
        message: One sentence, lower case, no period: what, got, expected.
        hint: The next step for the user, in the same form; None if there is no useful one.

    Attributes:
        exit_code: Exit code of the command line.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        message = for_people(message)
        super().__init__(message)
        self.message = message
        self.hint = hint and for_people(hint)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(LorakeetError, ValueError, TypeError):
    """A setting is unknown, of the wrong type or out of range."""


class TargetError(ConfigError):
    """``target_modules`` or a related setting matches no layer, or misses one of its names."""


class BaseModelError(LorakeetError, ValueError):
    """The base model cannot be found, read or used with these settings."""


class DataError(LorakeetError, ValueError):
    """The data cannot be found, read or trained on."""


class AdapterError(LorakeetError, ValueError, KeyError, RuntimeError):
    """An adapter, on disk or in memory, is missing, damaged or does not fit."""


class MergeError(LorakeetError, RuntimeError, ValueError):
    """A merge would be wrong or lose the update, or a layer cannot be merged. (PEFT raises a ValueError.)"""


class TrainingError(LorakeetError, RuntimeError):
    """A run cannot start or cannot continue."""


class ProcessError(TrainingError):
    """Another process of the run failed, so this one ends too; the exit code is that of the other."""


class MissingLibraryError(LorakeetError, ImportError):
    """An optional package is not installed; the hint names the extra that has it."""


class RequestError(LorakeetError, ValueError):
    """A request to a serving engine is out of range, or asks for what this model cannot do."""


class UnknownAdapter(RequestError, KeyError):  # noqa: N818 (as queue.Full)
    """A request names an adapter that is not served."""


class QueueFull(LorakeetError, RuntimeError):  # noqa: N818
    """A serving engine has as many waiting requests as it takes."""


class EngineStopped(LorakeetError, RuntimeError):  # noqa: N818
    """A serving engine stops, and takes no further request."""


class OutputError(LorakeetError, OSError):
    """An output path is not writable, or already holds something."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return at most ``count`` names of ``known`` that are similar to ``word``, best first."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.5)
    return close or [name for name in names if word.lower() in name.lower() or name.lower() in word.lower()][:count]


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a hint with the most similar known names, or None if there are none."""
    close = nearest(word, known)
    return f"did you mean {', '.join(map(repr, close))}?" if close else None
