"""Manifest of a checkpoint: its files with size and SHA-256, the fingerprint of its run, and counters of the Trainer.

Reading a checkpoint begins with its manifest, which has a hash of its own. Whatever was cut, changed or lost since it was
written is named, and the checkpoint is not used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakeet.errors import TrainingError
from lorakeet.log import warn
from lorakeet.security.json_file import read_object
from lorakeet.security.paths import is_dir, is_file, matching, outside, paths_below

#: Name of the file that lists a checkpoint's files and the run's fingerprint.
MANIFEST = "lorakeet_checkpoint.json"
#: Key of the hash that the manifest has of itself.
_SELF = "manifest_sha256"
#: Name of a checkpoint's folder, with its step.
_NAME = re.compile(r"checkpoint-(\d+)")


def write_manifest(
    folder: Path, fingerprint: Mapping[str, Any], versions: Mapping[str, str], progress: Mapping[str, Any]
) -> None:
    """Write the manifest of the checkpoint whose other files are in ``folder``.

    Args:
        folder: The checkpoint's folder, complete but for the manifest.
        fingerprint: Facts that a run must share to resume from it.
        versions: Versions of the programs that wrote it.
        progress: Counters of the Trainer that ``trainer_state.json`` does not hold.
    """
    names = sorted(str(path.relative_to(folder)) for path in paths_below(folder) if is_file(path))
    manifest = {
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in names
        },
        "fingerprint": dict(fingerprint),
        "versions": dict(versions),
        "progress": dict(progress),
    }
    text = json.dumps({**manifest, _SELF: _own_hash(manifest)}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_hash(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != _SELF}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint, all of whose files are as they were written.

    Raises:
        TrainingError: The folder is no checkpoint of Lorakeet, or files in it are missing or damaged.
    """
    try:
        manifest = read_object(folder / MANIFEST)
        if manifest[_SELF] != _own_hash(manifest):
            raise ValueError("its hash differs")
        files, *_ = (dict(manifest[part]) for part in ("files", "fingerprint", "versions", "progress"))
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(
            f"{folder} has no readable {MANIFEST}, so it is not a complete checkpoint of Lorakeet",
            "resume from another one, or start again",
        ) from None
    damaged = [fault for name, written in files.items() if (fault := _fault(folder, name, written))]
    if damaged:
        raise TrainingError(f"checkpoint {folder} is incomplete: {', '.join(damaged)}", "resume from an earlier one")
    return manifest


def _fault(folder: Path, name: str, written: Mapping[str, Any]) -> str | None:
    """Return what became of a file of the manifest, None if nothing."""
    if place := outside(folder, name):
        return f"{name} (leads out of the folder, to {place})"
    path = folder / name
    try:
        size = path.stat().st_size if is_file(path) else None
        if size != written["bytes"]:
            return f"{name} (expected {written['bytes']} bytes, got {'none' if size is None else size})"
        return None if file_hash(path) == written["sha256"] else f"{name} (its content has changed)"
    except OSError as error:
        return f"{name} ({error.strerror})"
    except (KeyError, TypeError):
        return f"{name} (its size and hash are not readable)"


def checkpoints(run_folder: str | Path) -> dict[int, Path]:
    """Return the folders below ``run_folder`` that are named as checkpoints, by step, the newest first."""
    folders = [path for path in matching(Path(run_folder), "checkpoint-*") if is_dir(path)]
    found = {int(match[1]): path for path in folders if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint below ``run_folder``; a warning names each damaged one that is newer."""
    for folder in checkpoints(run_folder).values():
        try:
            read_manifest(folder)
        except TrainingError as error:
            warn(f"{error.message}; it is left out, and the one before is taken")
            continue
        return folder
    return None


def remove_checkpoints(folders: Iterable[Path]) -> None:
    """Remove checkpoints; each is renamed first, so that a kill leaves none that is half there."""
    for folder in folders:
        with suppress(FileNotFoundError):  # another program has removed it already
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def keep_checkpoints(run_folder: Path, newest: int, best: int | None, most: int | None) -> None:
    """Remove older checkpoints until ``most`` are left, the newest and the best among them.

    Args:
        run_folder: Folder with the checkpoints.
        newest: Step of the newest; later ones are left over from another training, and are removed too.
        best: Step of the best; None: there is none.
        most: Checkpoints to keep; None: all, and nothing is removed.
    """
    if most is None:
        return
    steps = [step for step in checkpoints(run_folder) if step <= newest]
    kept = steps[:most]
    if best in steps and best not in kept:
        kept = [*kept[: max(1, len(kept) - 1)], best]
    remove_checkpoints(folder for step, folder in checkpoints(run_folder).items() if step not in kept)
