"""Atomic writes of files and folders, the cache folder, and single files of the hub.

:func:`write_file` and :func:`write_folder` write to a temporary path, flush it to disk and rename it. Links, mount
points and the current folder stay what they are.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from lorakeet.errors import LorakeetError, OutputError
from lorakeet.security.paths import exists, is_dir, is_file, matching, paths_below
from lorakeet.security.shown import redact

#: File name suffixes of formats that hold pickles; opening one can run code.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def cache_home() -> Path:
    """Return the only folder outside a run that Lorakeet writes to: ``$LORAKEET_HOME``, or the user's cache folder."""
    if home := os.environ.get("LORAKEET_HOME"):
        return Path(home).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lorakeet"


#: Error numbers of a full, limited or read-only disk.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
#: Reason of a write that fails because another program removes its folder.
_REMOVED = "its folder was removed meanwhile"
#: Names of torch's writer, which loses the error number of a failed write.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
#: Folder that a new ext4 file system has at its root.
_LOST_AND_FOUND = "lost+found"


def disk_problem(error: BaseException) -> str | None:
    """Return why the disk refused a write, or None if the error has another cause.

    safetensors and torch raise their own errors, which hold the system's message as text at best.
    """
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return os.strerror(error.errno)
    text = str(error)
    for number in _DISK_ERRORS:
        if os.strerror(number) in text:
            return os.strerror(number)
    return "a file could not be written" if any(name in text for name in _TORCH_WRITER) else None


@contextmanager
def _disk_problems(path: Path, aside: Path) -> Iterator[None]:
    """Raise an OutputError for a write that the disk refuses inside the block, whichever library writes.

    Args:
        path: The path to write, which messages name.
        aside: The temporary path that stands for it.
    """
    try:
        yield
    except OutputError as error:  # of a file in a temporary folder
        raise OutputError(error.message.replace(str(aside), str(path)), error.hint) from error
    except LorakeetError:
        raise
    except Exception as error:
        reason = disk_problem(error) or (None if exists(aside.parent) else _REMOVED)
        if reason:
            raise OutputError(f"cannot write {path}: {reason}", "free some space or choose another folder") from error
        raise


@contextmanager
def not_removed(folder: Path, path: Path | None = None) -> Iterator[Callable[[], None]]:
    """Yield a check that a folder is still the one that it is now: removed and made again, it has lost files.

    Args:
        folder: The folder.
        path: The path that messages name; None: the folder's own.

    Raises:
        OutputError: By the check, and for any error inside the block, if the folder has been removed.
    """
    fd = os.open(folder, os.O_RDONLY)

    def check() -> None:
        if not (exists(folder) and os.path.samestat(os.fstat(fd), folder.stat())):
            raise OutputError(
                f"cannot write {path or folder}: {_REMOVED}", "choose a folder that no other program removes"
            )

    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        os.close(fd)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Raise an OutputError for any error of the file system inside the block."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "choose a folder that you may write to"
        ) from error


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        if is_file(path):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(fd)


def _chmod(path: Path, mode: int) -> None:
    with suppress(OSError):  # FAT and some network file systems have no modes
        path.chmod(mode)


@contextmanager
def write_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, and rename it to ``path`` if the block raises nothing.

    A link stays a link: the file that it points to is replaced. A device or pipe is written to.

    Raises:
        OutputError: The folder is not writable, or the disk is full; ``path`` is as it was then.
    """
    path = Path(path)
    with _refusals(path):
        place = Path(os.path.realpath(path))
        if is_dir(place):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        special = exists(place) and not is_file(place)
        mode = place.stat().st_mode & 0o777 if is_file(place) else 0o644
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.gettempdir()) if special else place.parent
        fd, name = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".tmp", dir=folder)
        os.close(fd)
    aside = Path(name)
    try:
        with _disk_problems(path, aside):
            yield aside
            if special:
                place.write_bytes(aside.read_bytes())
                return
            _chmod(aside, mode)
            _fsync(aside)
            aside.replace(place)
            _fsync(place.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, and give ``path`` its contents if the block raises nothing.

    A new ``path`` appears by a rename. A folder that is there is filled, and its old contents are removed last. So the
    current folder, a mount point and the target of a link stay what they are.

    Raises:
        OutputError: The folder is not writable, or the disk is full; ``path`` is as it was then.
    """
    path = Path(path)
    with _refusals(path):
        place = Path(os.path.realpath(path))
        if exists(place) and not is_dir(place):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        parent = place if is_dir(place) else place.parent
        parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=parent))
    try:
        with _disk_problems(path, aside), not_removed(aside, path) as check:
            yield aside
            _chmod(aside, 0o755)
            for path_inside in paths_below(aside):
                if is_file(path_inside):
                    _chmod(path_inside, 0o644)  # some writers create files that only their owner may read
                _fsync(path_inside)
            _fsync(aside)
            check()
            if is_dir(place):
                _fill(place, aside)
            else:
                aside.rename(place)
            _fsync(parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fill(place: Path, aside: Path) -> None:
    """Replace the contents of ``place`` by those of ``aside``, a folder in it; put the old ones back after an error."""
    old = Path(tempfile.mkdtemp(prefix=".replaced.", suffix=".tmp", dir=place))
    moved: list[tuple[Path, Path]] = []
    try:
        for entry in contents(place):
            if entry not in (aside, old):
                moved.append((entry, old / entry.name))
                entry.rename(moved[-1][1])
        for entry in contents(aside):
            moved.append((entry, place / entry.name))
            entry.rename(moved[-1][1])
    except BaseException:  # a signal too, which may come before the last rename
        for origin, now in reversed(moved):
            if not os.path.lexists(origin):
                now.rename(origin)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def clear_aside(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files and folders that a killed process left behind.

    Args:
        folder: Where they are.
        names: Names, or patterns of names, of the files and folders that were to be written.
    """
    for leftover in chain.from_iterable(matching(folder, f".{name}.*.tmp") for name in names):
        if is_dir(leftover) and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def contents(folder: Path) -> list[Path]:
    """Return the entries of a folder, without the ``lost+found`` of a new file system."""
    return [entry for entry in folder.iterdir() if entry.name != _LOST_AND_FOUND]


def write_elsewhere(name: str, write: Callable[[Path], None]) -> Path | None:
    """Write a folder where there is still room: in the cache folder, else in the system's temporary folder.

    Args:
        name: Start of the folder's name.
        write: Function that writes into a folder.

    Returns:
        The folder; None if there is no room anywhere.
    """
    for root in (cache_home() / "rescued", Path(tempfile.gettempdir()) / "lorakeet-rescued"):
        try:
            root.mkdir(parents=True, exist_ok=True)
            place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
            with write_folder(place) as aside:
                write(aside)
        except OSError:  # an OutputError is one
            continue
        return place
    return None


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; secrets in its texts are hidden."""
    with write_file(path) as aside:
        aside.write_text(redact(json.dumps(value, indent=2, ensure_ascii=False)) + "\n", encoding="utf-8")


def hub_file(
    repo: str, filename: str, *, revision: str | None = None, repo_type: str = "model", **download: Any
) -> Path | None:
    """Download one file of a hub repository into the hub's own cache.

    The token, if any, is that of ``hf auth login`` or of ``HF_TOKEN``; no message contains it.

    Args:
        repo: Hub id, ``user/name``.
        filename: Path inside the repository.
        revision: Branch, tag or commit; the main branch by default.
        repo_type: ``model`` or ``dataset``.
        download: Further arguments of ``hf_hub_download``: ``token``, ``cache_dir``, ``local_files_only``, ….

    Returns:
        The cached file; None if the repository has no such file.

    Raises:
        LorakeetError: The hub cannot be reached and the file is not cached, or the repository does not exist.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename, revision=revision, repo_type=repo_type, **download))
    except LocalEntryNotFoundError as error:
        raise LorakeetError(
            f"{filename} of {repo!r} is not in the cache, and the hub cannot be reached",
            f"connect once, or run `hf download {repo}` on another machine and pass the folder",
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LorakeetError(
            f"cannot get {filename} of {repo!r} from the hub: {reason}",
            "check the name; for a private repository run `hf auth login`",
        ) from error


def check_output(folder: str | Path, need: int = 0) -> None:
    """Check that ``folder`` is writable and has ``need`` bytes free; create it if it is missing.

    Raises:
        OutputError: The folder is not writable, or has less free space.
    """
    folder = Path(folder)
    with _refusals(folder):
        place = Path(os.path.realpath(folder))
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    check_room(place, need)


def check_room(folder: str | Path, need: int) -> None:
    """Check that the disk of ``folder`` has ``need`` bytes free; creates nothing.

    Raises:
        OutputError: It has less free space.
    """
    place = Path(os.path.realpath(folder))
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if exists(path))).free
    if free < need:
        raise OutputError(
            f"{folder} has {free / 1e6:,.1f} MB free, and {need / 1e6:,.1f} MB will be written",
            "free some space or choose another folder",
        )
