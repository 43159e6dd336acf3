"""Errors of one process end all processes of a run, each with the message of the one that failed.

Without this the others wait for it, or die with an error of the network. A process that fails writes its message into the
store by which the processes have found each other. The others read it when their connection breaks. A thread in each
also looks once a second, for a process that waits on a connection that does not break.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import distributed

from lorakeet.errors import LorakeetError, ProcessError

#: Key of the first failure in the store.
_KEY = "lorakeet/failure"
#: Seconds between two looks of the thread.
LOOK = 1.0
#: Seconds that a process has, after another one failed, to end by itself.
GRACE = 20.0
#: Seconds to wait for the message of a process whose connection broke.
MESSAGE = 3.0
#: Exit code of a process that Ctrl-C or SIGTERM ended.
STOPPED = 130
#: Texts of errors of a connection that broke; gloo has no class for them.
_BROKEN = ("gloo", "connection closed", "connection reset", "broken pipe", "socket timeout")


@contextmanager
def shared_failures() -> Iterator[None]:
    """End all processes of a run at an error of any of them inside the block.

    Raises:
        ProcessError: Another process failed.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield
        return
    failures = _Failures()
    try:
        yield
    except BaseException as error:
        if (other := failures.reported(error)) is not None:
            raise other from None
        raise
    finally:
        failures.ended.set()


class _Failures:
    """The first failure of a run's processes, shared by their store."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.ended = threading.Event()
        store: Any = distributed.distributed_c10d._get_default_store()
        self.store, watched = store.clone(), store.clone()  # a connection that waits blocks all its users
        threading.Thread(target=self._watch, args=(watched,), daemon=True).start()

    def reported(self, error: BaseException) -> ProcessError | None:
        """Return the error of another process, if it is the cause of this one; else tell the others of this one."""
        broken = _is_broken_connection(error)
        deadline = time.monotonic() + (MESSAGE if broken else 0)
        found = self._read(self.store)
        while found is None and time.monotonic() < deadline:
            time.sleep(0.1)
            found = self._read(self.store)
        if found is None and not broken:
            found = self._write(error)
        if found is None:
            return ProcessError(
                f"another of the {self.world} processes ended without a message, perhaps killed: {_first_line(error)}",
                "look for its last lines above; where memory ran out, the system's log says so; then resume with --resume",
            )
        stopped_by_it = isinstance(error, KeyboardInterrupt) and found["exit_code"] != STOPPED
        return self._error(found) if found["rank"] != self.rank and (broken or stopped_by_it) else None

    def _error(self, failure: dict[str, Any]) -> ProcessError:
        error = ProcessError(f"process {failure['rank']} of {self.world} failed: {failure['message']}", failure["hint"])
        error.exit_code = failure["exit_code"]
        return error

    def _write(self, error: BaseException) -> dict[str, Any]:
        """Write this process's error, unless another was first; return the first."""
        own = error if isinstance(error, LorakeetError) else None
        mine = {
            "rank": self.rank,
            "message": own.message if own else _first_line(error),
            "hint": own.hint if own else None,
            "exit_code": own.exit_code if own else STOPPED if isinstance(error, KeyboardInterrupt) else 1,
        }
        with suppress(Exception):  # the store ends with the process that holds it
            first: dict[str, Any] = json.loads(self.store.compare_set(_KEY, "", json.dumps(mine)))
            return first
        return mine

    def _read(self, store: Any) -> dict[str, Any] | None:
        with suppress(Exception):
            if store.check([_KEY]):
                found: dict[str, Any] = json.loads(store.get(_KEY))
                return found
        return None

    def _watch(self, store: Any) -> None:
        """End this process where another has failed and this one still waits for it."""
        while not self.ended.wait(LOOK):
            failure = self._read(store)
            if failure is not None and failure["rank"] != self.rank:
                if not self.ended.wait(GRACE):
                    print(f"error: {self._error(failure).message}", file=sys.stderr, flush=True)
                    os._exit(failure["exit_code"])
                return


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an error says that the connection to another process broke."""
    known = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    text = str(error).lower()
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(word in text for word in _BROKEN))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
