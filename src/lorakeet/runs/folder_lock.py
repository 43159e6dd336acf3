"""The lock of a run's folder: two runs never write to one folder at the same time.

The lock belongs to the operating system, which releases it with the process, however that ends. So a file that a killed
run has left behind locks nothing. The file says who holds it: process and machine.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorakeet.errors import OutputError
from lorakeet.log import warn
from lorakeet.security.paths import exists

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Name of the file in a run's folder.
NAME = ".lock"
#: Errors of a file that another process has locked; all others say that the file system has no locks.
_HELD = (errno.EACCES, errno.EAGAIN)
#: Files that this process has locked: its own lock does not stop it.
_OWN: set[str] = set()


def check_unlocked(folder: str | Path) -> None:
    """Check that no other run holds the folder; creates nothing.

    Raises:
        OutputError: One does; the message names its process and machine.
    """
    path = Path(folder) / NAME
    if exists(path):
        with locked(folder):
            pass


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it does not exist; a file system without locks gives a warning.

    Raises:
        OutputError: Another run holds it; the message names its process and machine.
    """
    path = Path(os.path.realpath(folder)) / NAME
    if str(path) in _OWN:
        raise _refusal(path, {"pid": os.getpid(), "host": socket.gethostname()})
    file = _take(path)
    _OWN.add(str(path))
    try:
        yield
    finally:
        _OWN.discard(str(path))
        if file is not None:
            with suppress(OSError):
                if os.path.samestat(os.fstat(file), path.stat()):  # else the folder was removed, and is another run's
                    path.unlink()
            os.close(file)


def _take(path: Path) -> int | None:
    """Return the open, locked file; None on a file system that has no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while fcntl is not None:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            os.close(file)
            if error.errno in _HELD:
                raise _refusal(path, holder) from None
            warn(f"{path.parent} cannot be locked ({error.strerror}): a second run there would not be noticed")
            return None
        with suppress(OSError):
            if os.path.samestat(os.fstat(file), path.stat()):  # else the run before has just removed it
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                return file
        os.close(file)
    return None


def _holder(file: int) -> dict[str, Any]:
    """Return who wrote the file; an empty table where it cannot be read."""
    with suppress(OSError, ValueError):
        return dict(json.loads(os.pread(file, 1000, 0)))
    return {}


def _refusal(path: Path, holder: dict[str, Any]) -> OutputError:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown machine')}"
    return OutputError(
        f"{path.parent} is in use by another run, {who}", "wait for it, stop it, or choose another --out"
    )
