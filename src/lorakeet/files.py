"""Atomic writes of files and folders, the cache folder, and single files of the hub.

:func:`write_file` and :func:`write_folder` write to a temporary path, flush it to disk and rename it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakeet.errors import LorakeetError, OutputError

#: File name suffixes of formats that hold pickles; opening one can run code.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def cache_home() -> Path:
    """Return the only folder outside a run that Lorakeet writes to: ``$LORAKEET_HOME``, or the user's cache folder."""
    if home := os.environ.get("LORAKEET_HOME"):
        return Path(home).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lorakeet"


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def write_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, and rename it to ``path`` if the block raises nothing.

    Raises:
        OutputError: The folder is not writable.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(fd)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "choose a folder that you may write to"
        ) from error
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)
        _fsync(aside)
        aside.replace(path)
        _fsync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``path``, and replace ``path`` by it if the block raises nothing.

    Raises:
        OutputError: The parent folder is not writable.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "choose a folder that you may write to"
        ) from error
    try:
        yield aside
        aside.chmod(0o755)
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # some writers create files that only their owner may read
                _fsync(file)
        if path.exists():
            old = path.with_name(f".{path.name}.old.tmp")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            aside.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with write_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    probe = folder / ".lorakeet-probe.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"lorakeet")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}", "choose a folder that you may write to"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"{folder} has {free / 1e6:,.0f} MB free, and a checkpoint needs {need / 1e6:,.0f} MB",
            "free some space or choose another folder",
        )
