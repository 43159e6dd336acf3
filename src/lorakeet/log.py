"""User messages, one line each, through the logger ``lorakeet`` to stderr.

A program that uses Lorakeet as a library silences them as with any logger: ``logging.getLogger("lorakeet").setLevel(...)``.
A warning is also a :class:`LorakeetWarning` of Python's ``warnings``, for programs that record warnings or make them errors.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lorakeet.security.shown import for_people

log = logging.getLogger("lorakeet")


class LorakeetWarning(UserWarning, RuntimeWarning):
    """A warning of Lorakeet; code written for ``peft`` expects either parent. Python prints none: the log has it already."""


class _StderrHandler(logging.Handler):
    """Handler that looks up ``sys.stderr`` at each message: a test or a progress bar may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        print(prefix + record.getMessage(), file=sys.stderr, flush=True)


def _log(level: int, message: str) -> None:
    """Log a message, its secrets hidden; without any logging configured, install a handler for stderr first."""
    if not log.hasHandlers():
        log.addHandler(_StderrHandler())
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
    log.log(level, for_people(message))


@contextmanager
def silent() -> Iterator[None]:
    """Log nothing in this context."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def info(message: str) -> None:
    """Log progress or a choice that the user may want to know."""
    _log(logging.INFO, message)


def warn(message: str) -> None:
    """Log a problem that may spoil the user's result, and issue it as a :class:`LorakeetWarning`."""
    _log(logging.WARNING, message)
    if not any(entry[2] is LorakeetWarning for entry in warnings.filters):
        # appended: any filter of the program, such as "error" or one that records, comes first
        warnings.simplefilter("ignore", LorakeetWarning, append=True)
    warnings.warn(for_people(message), LorakeetWarning, stacklevel=3)
