"""Bundle of files as one text of bytes, which a fuzzer mutates and a target unpacks into a folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

#: Name of the file of an input that is no bundle.
INPUT = "input"
_HEADER = re.compile(rb"== (file|link|pipe) ([\w. /-]{1,200}) (\d{1,9})\n")


@dataclass(frozen=True)
class Entry:
    """One file of a bundle.

    Attributes:
        kind: ``file``, ``link`` or ``pipe``.
        name: Its name; one with ``..`` or an absolute one is left out.
        content: Bytes of a file, target of a link.
    """

    kind: str
    name: str
    content: bytes


def pack(entries: list[Entry]) -> bytes:
    """Return the bundle of these files."""
    return b"".join(
        b"== %s %s %d\n%s\n" % (e.kind.encode(), e.name.encode(), len(e.content), e.content) for e in entries
    )


def files(**contents: bytes) -> bytes:
    """Return a bundle of plain files; ``__`` in a keyword stands for a dot."""
    return pack([Entry("file", name.replace("__", "."), content) for name, content in contents.items()])


def unpack(bundle: bytes) -> list[Entry]:
    """Return the files of a bundle; what is broken in it is left out."""
    entries, at = [], 0
    while match := _HEADER.search(bundle, at):
        kind, name, length = match[1].decode(), match[2].decode(), int(match[3])
        entries.append(Entry(kind, name, bundle[match.end() : match.end() + length]))
        at = match.end() + len(entries[-1].content)
    return entries


def write(data: bytes, folder: Path) -> None:
    """Write the files of a bundle, or the one file of another input, into ``folder``; OUTSIDE is the folder beside it."""
    entries = unpack(data) if data.startswith(b"== ") else [Entry("file", INPUT, data)]
    for entry in entries:
        path = folder / entry.name
        if ".." in Path(entry.name).parts or Path(entry.name).is_absolute() or os.path.lexists(path):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "file":
            path.write_bytes(entry.content.replace(b"OUTSIDE", str(folder.parent / "outside").encode()))
        elif entry.kind == "pipe":
            os.mkfifo(path)
        elif target := entry.content.decode(errors="replace").replace("\0", ""):
            path.symlink_to(target.replace("OUTSIDE", str(folder.parent / "outside"))[:200])
