"""Files: where the cache is, how a file or folder is written whole or not at all, how a name becomes a path.

Nothing is ever half-written: :func:`write_file` and :func:`write_folder` write aside, flush to disk and rename.
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

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def cache_home() -> Path:
    """The one folder outside a run that Lorakeet writes to: ``$LORAKEET_HOME``, else the user's cache folder."""
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
    """Yield a temporary path beside ``path``; when the block ends well, it is renamed over ``path``.

    Raises:
        OutputError: the folder cannot be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(fd)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "choose a folder you may write to"
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
    """Yield a temporary folder beside ``path``; when the block ends well, it takes the place of ``path``.

    Raises:
        OutputError: the parent folder cannot be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}", "choose a folder you may write to"
        ) from error
    try:
        yield aside
        aside.chmod(0o755)
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # some writers leave files that only their owner may read
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
    """Write ``value`` as indented JSON, whole or not at all."""
    with write_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hub_file(repo: str, filename: str, *, revision: str | None = None, repo_type: str = "model") -> Path | None:
    """``filename`` of the hub repository ``repo``, downloaded into the hub's own cache; None if the repo lacks it.

    Raises:
        LorakeetError: the hub cannot be reached and the file is not cached, or the repository does not exist. The
            token, if any, is the one of the usual login or of ``HF_TOKEN``; it is never shown.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename, revision=revision, repo_type=repo_type))
    except LocalEntryNotFoundError as error:
        raise LorakeetError(
            f"{filename} of {repo!r} is not cached here and the hub cannot be reached",
            f"connect once, or run `hf download {repo}` elsewhere and give its folder",
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LorakeetError(
            f"cannot get {filename} of {repo!r} from the hub: {reason}",
            "check the name, and `hf auth login` if private",
        ) from error


def check_output(folder: str | Path, need: int = 0) -> None:
    """See that ``folder`` can be written to and has room for ``need`` bytes.

    Raises:
        OutputError: it cannot, or has not.
    """
    folder = Path(folder)
    probe = folder / ".lorakeet-probe.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"lorakeet")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}", "choose a folder you may write to"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OutputError(
            f"{folder} has {free / 1e6:,.0f} MB free, a checkpoint needs {need / 1e6:,.0f} MB",
            "free some space or choose another folder",
        )
