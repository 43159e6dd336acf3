"""Operations of a session on the files of a folder, seen by an audit hook of Python, and acts at one of them.

The hook sees the moment before a file is opened, renamed, removed or made. So a kill at the n-th operation falls exactly
between two of them, and a disk fills up exactly before one write. Of files that a library writes by itself it sees nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Beginnings of the events that are operations on files.
EVENTS = ("os.", "shutil.", "tempfile.")


def at_each(folder: Path, act: Callable[[int], None]) -> Callable[[], None]:
    """Return the function that lets its process call ``act`` with the number of each operation in ``folder``."""
    inside, count, busy = str(folder), [0], [False]

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if busy[0] or not (event == "open" or event.startswith(EVENTS)):
            return
        names = [os.fsdecode(value) for value in values[:2] if isinstance(value, (str, bytes, os.PathLike))]
        if any(name.startswith(inside) for name in names):
            count[0] += 1
            busy[0] = True
            try:
                act(count[0])
            finally:
                busy[0] = False

    return lambda: sys.addaudithook(hook)


def at_number(folder: Path, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return the function that lets its process call ``act`` at the operation of this number in ``folder``."""
    return at_each(folder, lambda count: act() if count == number else None)


def kill() -> None:
    """End this process, as a machine that takes back its memory does."""
    os.kill(os.getpid(), signal.SIGKILL)


def count_into(file: Path) -> Callable[[int], None]:
    """Return the function that writes the number of each operation into ``file``, so that the last one stays."""
    return lambda count: file.write_text(str(count)) and None
