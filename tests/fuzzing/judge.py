"""Judge of one input: only success or an error of Lorakeet, in seconds, in bounded memory, inside of the folder."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing.bundle import write
from lorakeet.errors import LorakeetError

#: Seconds of the processor that one input may take.
SECONDS = 6.0
#: The same in seconds of the clock, as a factor: on a busy machine a process waits.
WAITS = 10
#: Bytes of address space that one input may add.
MEMORY = 3 << 30
#: Characters of the longest message of an error.
LONGEST_MESSAGE = 200_000
#: Names of the files beside the folder, which nothing may open: those that readers look for.
CANARIES = (
    *("config.json", "adapter_config.json", "adapter_model.safetensors", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "lorakeet.json", "data.jsonl", "run.yaml", "metrics.jsonl", "model.gguf", "secret.txt"),
)
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_OPENING = 0x00000020 | 0x00000001  # IN_OPEN, IN_ACCESS


class HangError(BaseException):
    """An input took too long; no handler of ordinary errors catches it."""


@dataclass(frozen=True)
class Finding:
    """Failure of a reader on an input.

    Attributes:
        kind: ``error``, ``hang``, ``outside``, ``write`` or ``message``.
        detail: One line: class and place of the error, or the path.
        trace: The traceback, if there is one.
    """

    kind: str
    detail: str
    trace: str = ""


class Arena:
    """Folder that inputs are unpacked into, beside a folder of canaries that is watched."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="lorakeet-fuzz-"))
        self.folder, self.outside = self.root / "inside", self.root / "outside"
        self.outside.mkdir()
        for name in CANARIES:
            (self.outside / name).write_text('{"secret": "canary"}\n')
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._watch = self._libc.inotify_init1(os.O_NONBLOCK)
        self._libc.inotify_add_watch(self._watch, str(self.outside).encode(), _OPENING)
        self.written: list[str] = []
        self._armed = False
        sys.addaudithook(self._audit)

    def close(self) -> None:
        """Remove the folders."""
        os.close(self._watch)
        shutil.rmtree(self.root, ignore_errors=True)

    def opened(self) -> list[str]:
        """Return the canaries that were opened since the last call, by whatever code."""
        try:
            events = os.read(self._watch, 1 << 16)
        except BlockingIOError:
            return []
        names, at = [], 0
        while at < len(events):
            _, mask, _, length = struct.unpack_from("iIII", events, at)
            name = events[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            if not mask & 0x40000000:  # a folder that is listed
                names.append(name)
            at += 16 + length
        return names

    @contextmanager
    def armed(self) -> Iterator[Path]:
        """Yield an empty folder; files that Python opens for writing are listed in ``written`` meanwhile."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.written.clear()
        self.opened()
        yield self.folder

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note writes in this context."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._armed or event != "open":
            return
        path, mode, flags = args
        writes = set(mode or "") & set("wax+") or (not mode and (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(path, (str, bytes)) and not os.fsdecode(path).startswith(("/dev/", "/proc/")):
            self.written.append(os.fsdecode(path))


def judge(run: Callable[[Path], None], data: bytes, arena: Arena) -> Finding | None:
    """Run one input; return the failure, or None.

    Args:
        run: A target.
        data: The input.
        arena: Where it is unpacked.
    """
    with arena.armed() as folder:
        write(data, folder)
        finding = _tried(run, folder, arena)
    if opened := arena.opened():
        return Finding("outside", f"opened {opened[0]}", finding.trace if finding else "")
    if arena.written:
        return Finding("write", re.sub(r"[0-9a-f]{6,}|tmp\w+", "*", arena.written[0]))
    return finding


def _tried(run: Callable[[Path], None], folder: Path, arena: Arena) -> Finding | None:
    with _limits(), arena.listening():
        try:
            run(folder)
        except LorakeetError as error:
            return _message_problem(str(error))
        except HangError:
            trace = traceback.format_exc()
            return Finding("hang", _place(trace), trace)
        except Exception as error:
            trace = traceback.format_exc()
            return Finding("error", f"{type(error).__name__} at {_place(trace)}", trace)
    return None


def _message_problem(text: str) -> Finding | None:
    if len(text) > LONGEST_MESSAGE:
        return Finding("message", f"{len(text):,} characters: {text[:80]!r}")
    return Finding("message", f"a control character in {text[:120]!r}") if _STEERING.search(text) else None


def _place(trace: str) -> str:
    """Return file and line of the innermost frame in Lorakeet, and of the innermost of all."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    own = [frame for frame in frames if "/lorakeet/" in frame[0]]
    return " < ".join(f"{'/'.join(Path(name).parts[-2:])}:{line}" for name, line in [frames[-1], *own[-1:]])


@contextmanager
def _limits() -> Iterator[None]:
    """Stop code that hangs or fills the memory."""

    def stop(*_: object) -> None:
        raise HangError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITS * SECONDS)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)
