"""What the program says while it works: one line at a time, to stderr, through the logger ``lorakeet``.

A program that uses Lorakeet as a library silences it as any logger: ``logging.getLogger("lorakeet").setLevel(...)``.
"""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("lorakeet")


class _Stderr(logging.Handler):
    """Writes to whatever ``sys.stderr`` is now (a test or a progress bar may have replaced it)."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        print(prefix + record.getMessage(), file=sys.stderr, flush=True)


def _speak(level: int, message: str) -> None:
    if not log.hasHandlers():  # nobody configured logging: a person is watching
        log.addHandler(_Stderr())
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
    log.log(level, message)


def info(message: str) -> None:
    """Tell the person something they would want to know."""
    _speak(logging.INFO, message)


def warn(message: str) -> None:
    """Tell the person something that may spoil their result."""
    _speak(logging.WARNING, message)
