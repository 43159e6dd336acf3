"""Resident memory of this process: now, at its peak, and what can be returned to the system."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

from lorakeet.security.paths import exists

#: Bytes. Larger blocks are mapped on their own, where memory is short: each then costs the time of fresh pages.
MAPPED_ALONE = 1 << 24
#: Bytes of free memory that stay at the end of the heap.
FREE_AT_END = 1 << 23
#: Numbers of these parameters in glibc's ``malloc.h``.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
#: Bytes. Peak resident memory of this process before :func:`restart_peak`.
_earlier_peak = 0


def resident_bytes() -> int:
    """Return the resident memory of this process now; its peak where the system does not say it."""
    found = _in_status("VmRSS")
    return peak_rss_bytes() if found is None else found


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return max(_earlier_peak, peak_since_restart())


def restart_peak() -> None:
    """Set the peak of :func:`peak_since_restart` back to what is resident now, where the system can; Linux does."""
    global _earlier_peak
    _earlier_peak = peak_rss_bytes()
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")


def peak_since_restart() -> int:
    """Return the peak resident memory since :func:`restart_peak`, in bytes."""
    found = _in_status("VmHWM")
    if found is not None:  # getrusage includes the parent's memory from before exec
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_free_memory() -> None:
    """Return the free parts of the heap to the system.

    The C library of Linux keeps what is freed, in pieces that a large tensor does not fit into: the next one takes new
    memory, and the process grows.
    """
    with suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """Let the C library of Linux map each large block on its own, so that freed ones leave no holes in the heap.

    By itself the library puts blocks of up to 32 MiB into the heap, after the first of that size is freed. Long passes then
    take up to twice the memory of their tensors.
    """
    with suppress(OSError, AttributeError):  # other C libraries have no such function
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, MAPPED_ALONE)
        library.mallopt(_M_TRIM_THRESHOLD, FREE_AT_END)


def share_one_heap() -> None:
    """Let all threads take memory from one heap; call it before there are threads.

    By itself the C library of Linux gives each thread a heap of its own. What a request leaves there keeps the free memory
    around it, which no other thread can use.
    """
    with suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _in_status(name: str) -> int | None:
    """Return a size in bytes from the system's figures of this process; None where the system has none."""
    status = Path("/proc/self/status")
    if not exists(status):
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
