"""Registry of planted failures: functions that provoke a row of the guard table, and what the user sees then."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakeet.errors import LorakeetError
from lorakeet.log import log

#: Row of the table -> function that plants its failure in a new folder and returns what the user sees.
PLANTED: dict[int, Callable[[Path], list[str]]] = {}


def plants(row: int) -> Callable[[Callable[[Path], list[str]]], Callable[[Path], list[str]]]:
    """Register a function for a row of the table."""

    def register(function: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        PLANTED[row] = function
        return function

    return register


def seen(row: int, folder: Path) -> list[str]:
    """Return what the user sees of a row's failure: first lines, without what depends on the machine."""
    messages = [message.partition("\n")[0] for message in PLANTED[row](folder)]
    changes = {rf"{re.escape(str(folder))}/?": "", r"\.(\w+)\.\w{8}\.tmp": r".\1.tmp", r"\d+\.\d{2,}": "…", r"\s+": " "}
    for pattern, text in changes.items():
        messages = [re.sub(pattern, text, message) for message in messages]
    return [message.strip() for message in messages]


def refused(function: Callable[..., Any], *args: Any, **settings: Any) -> str:
    """Return the message of the error that a call raises."""
    try:
        function(*args, **settings)
    except LorakeetError as error:
        return error.message
    raise AssertionError("nothing was refused")


@contextmanager
def logged() -> Iterator[list[str]]:
    """Yield the list of the messages that are logged inside the block."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, level = Keep(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def first(messages: list[str], part: str) -> str:
    """Return the first message that holds a text."""
    return next(message for message in messages if part in message)
