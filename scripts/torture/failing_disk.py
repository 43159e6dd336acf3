"""A small disk in memory, and the ways in which it fails: full, limited or read-only."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Bytes of a small disk: several times what the run writes.
DISK_BYTES = 32 * 2**20
#: Bytes of the largest file under a limit: more than a session says, less than weights, optimizer or tokenizer.
FILE_BYTES = 2**13
#: Name of the file that fills a disk.
BALLAST = "ballast"


def can_mount() -> bool:
    """Whether this process may mount file systems: it is root, and not in a container that forbids it."""
    with tempfile.TemporaryDirectory() as folder:
        return os.geteuid() == 0 and _mount(Path(folder), DISK_BYTES) and _unmount(Path(folder))


def _mount(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _unmount(folder: Path) -> bool:
    return subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(folder: Path, size: int = DISK_BYTES) -> Iterator[Path]:
    """Set up a disk in memory at ``folder`` inside the block.

    Raises:
        OSError: It cannot be mounted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount(folder, size):
        raise OSError(f"cannot mount a disk at {folder}")
    try:
        yield folder
    finally:
        _unmount(folder)


def fill(disk: Path) -> None:
    """Write until the disk is full."""
    with (disk / BALLAST).open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))
    with (disk / BALLAST).open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(64))


def limit_files() -> None:
    """Let this process write no files that are larger than :data:`FILE_BYTES`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def make_read_only(disk: Path) -> None:
    """Switch the disk to refuse every write; one with an open file stays as it is."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, check=False)


def make_usable(disk: Path) -> None:
    """Undo what was done to a disk."""
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], capture_output=True, check=False)
    (disk / BALLAST).unlink(missing_ok=True)
