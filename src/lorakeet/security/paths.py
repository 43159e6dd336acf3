"""Paths that a folder of a stranger leads to: regular files inside of it, and nothing else.

A link may point to another place in the folder. In the hub's cache it may point to the ``blobs`` of its repository, where
``huggingface_hub`` keeps the contents of all files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
#: Characters of the longest name of a repository on the hub.
_LONGEST_HUB_ID = 96
#: Bytes of the longest name of a file.
_LONGEST_NAME = 255
#: Mode of a file -> what it is called, for those that are no regular files.
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def exists(path: str | Path) -> bool:
    """Whether there is a file, a folder or anything else at ``path``."""
    return _mode(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether ``path`` is a regular file, or a link to one."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_dir(path: str | Path) -> bool:
    """Whether ``path`` is a folder, or a link to one."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def matching(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in ``folder`` that match; none if it is missing, also if it is removed at this moment.

    ``Path.glob`` raises an error on the latter.
    """
    try:
        return list(folder.glob(pattern))
    except FileNotFoundError:
        return []


def paths_below(folder: Path) -> Iterator[Path]:
    """Yield the files and folders at any depth of ``folder``, in no order; links to folders are not followed.

    ``Path.rglob`` raises an error on a link to too long a name, in some versions of Python.
    """
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))


def _mode(path: str | Path) -> int | None:
    """Return the mode of a path; None if nothing is there, or a link leads in a circle or to too long a name.

    ``Path.exists`` and its siblings raise an error on the last of these.
    """
    try:
        return os.stat(path).st_mode  # noqa: PTH116 (Path.stat is slower and the same)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.EBADF):
            return None
        raise


def outside(folder: str | Path, name: str | Path) -> str | None:
    """Return the place outside of ``folder`` that the file ``name`` in it leads to; None if it stays inside.

    Args:
        folder: The folder; it may itself be reached by a link.
        name: Path of the file, relative to the folder. It need not exist.
    """
    root = Path(os.path.realpath(folder))
    place = Path(os.path.realpath(root / name))
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return None if any(place.is_relative_to(one) for one in roots) else str(place)


def irregular(path: str | Path) -> str | None:
    """Return what ``path`` is if it is no regular file: a folder, a pipe, a device; None if it is one, or nothing."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (Path.stat is slower and the same)
    except FileNotFoundError:
        return None
    except OSError as error:  # a link in a circle, or to a name that is too long
        return f"not readable ({error.strerror})"
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a special file")


def file_problem(folder: str | Path, name: str | Path) -> str | None:
    """Return why the file ``name`` in ``folder`` must not be opened; None if it may."""
    if place := outside(folder, name):
        return f"{name} leads out of the folder, to {place}"
    if kind := irregular(Path(folder) / name):
        return f"{name} is {kind}, expected a file"
    return None


def folder_problems(folder: Path, patterns: Iterable[str] = ("*",)) -> list[str]:
    """List the files in ``folder`` that must not be opened, each with the reason; folders do not count."""
    names = {path.relative_to(folder) for path in _matching(folder, patterns)}
    return [problem for name in sorted(names) if (problem := file_problem(folder, name))]


def _matching(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (path for path in folder.glob(pattern) if path.is_symlink() or not is_dir(path))


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be that of a repository on the hub, ``name`` or ``user/name``; a path cannot."""
    if len(name) > _LONGEST_HUB_ID or "--" in name or ".." in name or name.endswith((".gguf", ".git")):
        return False
    return _HUB_ID.fullmatch(name) is not None


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is the name of a file in the same folder: no path, no parent, no drive."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        return False
    return len(name.encode(errors="replace")) <= _LONGEST_NAME
