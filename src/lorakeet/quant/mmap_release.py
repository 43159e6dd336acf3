"""Release resident memory of memory-mapped checkpoint files while they are read.

Pages of a mapped file stay resident after they are read, in the end as many as the whole base has. Here they are released
from time to time. Nothing is lost: the system reads a page again when it is needed.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

from lorakeet.security.paths import exists

#: Bytes. Pages are released whenever this much has been read.
EVERY = 1 << 24
_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """Memory mappings of files, created between the constructor and the first tensor read; Linux only, else empty.

    Older mappings of the same files are left alone: changes of values in their memory would be lost.

    Args:
        files: Paths of the files.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self.files = {str(Path(file).resolve()) for file in files}
        self.others = self._mappings()
        self.own: set[tuple[int, int]] | None = None
        self.read = 0

    def count(self, size: int) -> None:
        """Note that ``size`` bytes have been read; release resident pages every :data:`EVERY` bytes."""
        if self.own is None:
            self.own = self._mappings() - self.others
        self.read += size
        if self.read >= EVERY:
            self.release()

    def release(self) -> None:
        """Release the resident pages of what has been read."""
        self.read = 0
        for start, end in (self.own or set()) & self._mappings():  # those that still exist
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    def _mappings(self) -> set[tuple[int, int]]:
        """Return the start and end address of each mapping."""
        found = set()
        if self.files and hasattr(mmap, "MADV_DONTNEED") and exists(_MAPS):
            for line in _MAPS.read_text(errors="replace").splitlines():
                words = line.split(maxsplit=5)  # "7f60f8a00000-7f6118b2a000 rw-p 00000000 fe:00 5456056 /path"
                if words[-1] in self.files:
                    start, end = words[0].split("-")
                    found.add((int(start, 16), int(end, 16)))
        return found
