"""What is resident of the files that a base is read from.

The files are mapped into memory: what has been read stays resident until the system wants it back, as large as the whole base
in the end. Here it is given back in between. Nothing is lost: it is read again from the file if it is asked for again.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

#: Bytes that may be read until the next time.
EVERY = 1 << 26
_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """Mappings of some files, made between now and the reading of the first tensor; none on other systems than Linux.

    Nobody else's: whoever has the same file open may have changed values in its memory, and these would be lost.

    Args:
        files: paths of the files.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self.files = {str(Path(file).resolve()) for file in files}
        self.others = self._mappings()
        self.own: set[tuple[int, int]] | None = None
        self.read = 0

    def count(self, size: int) -> None:
        """So many bytes have been read; now and then this gives back what is resident."""
        if self.own is None:
            self.own = self._mappings() - self.others
        self.read += size
        if self.read >= EVERY:
            self.read = 0
            for start, end in self.own & self._mappings():  # those that are still there
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    def _mappings(self) -> set[tuple[int, int]]:
        """Start and end of each."""
        found = set()
        if self.files and hasattr(mmap, "MADV_DONTNEED") and _MAPS.exists():
            for line in _MAPS.read_text(errors="replace").splitlines():
                words = line.split(maxsplit=5)  # "7f60f8a00000-7f6118b2a000 rw-p 00000000 fe:00 5456056 /path"
                if words[-1] in self.files:
                    start, end = words[0].split("-")
                    found.add((int(start, 16), int(end, 16)))
        return found
