"""Sessions of the command line in processes of their own: forked from this one, which has imported everything, or started."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

#: Seconds between two looks at a session that runs.
PAUSE = 0.001
#: Seconds after which a session hangs.
LONGEST = 300.0


@dataclass(frozen=True)
class Ended:
    """A session that has ended: its exit code (negative: the signal that ended it), output and duration."""

    code: int
    said: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL

    @property
    def crashed(self) -> bool:
        """Whether it ended as no session may: by a bug, another signal or a traceback, or without a word."""
        lost = self.code not in (0, 2, -signal.SIGKILL) or "Traceback" in self.said
        return lost or (self.code == 2 and "error: " not in self.said)


@dataclass(frozen=True)
class Session:
    """A running session of the command line.

    Attributes:
        pid: Its process.
        log: File of its output.
        began: Reading of the clock at its start.
    """

    pid: int
    log: Path
    began: float

    def wait(self, kill_now: Callable[[float], bool] | None = None) -> Ended:
        """Wait for its end; send SIGKILL as soon as ``kill_now``, called with the seconds so far, says so.

        Raises:
            TimeoutError: It hangs; it is killed then.
        """
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            seconds = time.monotonic() - self.began
            if ended:
                said = self.log.read_text(encoding="utf-8", errors="replace")
                return Ended(os.waitstatus_to_exitcode(status), said, seconds)
            hangs = seconds > LONGEST
            if hangs or (kill_now is not None and kill_now(seconds)):
                os.kill(self.pid, signal.SIGKILL)
                kill_now = None
            if hangs:
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"the session runs for {seconds:.0f} s: {self.log}")
            time.sleep(PAUSE)


def fork(words: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> Session:
    """Run ``lorakeet`` with these words in a fork of this process.

    Args:
        words: Command, flags and settings.
        log: File for its output.
        before: Function to call in the fork, before the command.
    """
    import_everything()
    gc.freeze()  # the fork need not look through all modules for garbage
    began = time.monotonic()
    if pid := os.fork():
        return Session(pid, log, began)
    return _become(words, log, before)


def start(words: Sequence[str], log: Path) -> Session:
    """Run ``lorakeet`` with these words in a new interpreter, as a shell does."""
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "lorakeet", *words], stdout=file, stderr=file)
    process.returncode = 0  # this module waits for it
    return Session(process.pid, log, began)


def import_everything() -> None:
    """Import in this process what a training imports, so that its forks need not."""
    import matplotlib.pyplot  # noqa: F401

    import lorakeet.cli.train
    import lorakeet.train.run  # noqa: F401
    from lorakeet.kernels.cpu.build import library

    library()  # compiled once, for all forks


def _become(words: Sequence[str], log: Path, before: Callable[[], None] | None) -> NoReturn:
    """Run the command and end this process, without the handlers and buffers of its parent."""
    from lorakeet.cli import main

    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False, encoding="utf-8") for fd in (1, 2))
        for name in (None, "lorakeet"):
            logging.getLogger(name).handlers.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before is not None:
            before()
        code = main(list(words))
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):  # a log that cannot be written
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
