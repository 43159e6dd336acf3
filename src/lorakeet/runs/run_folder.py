"""The folder of a run: checks before a run uses it, ``run.yaml`` and ``summary.json``."""

from __future__ import annotations

import os
import shutil
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import OutputError, TrainingError
from lorakeet.files import check_output, clear_aside, contents, write_file
from lorakeet.security.json_file import JsonError, read_object
from lorakeet.security.paths import exists, is_dir

#: Files and folders that a run writes.
FILES = (
    "run.yaml",
    "metrics.jsonl",
    "summary.json",
    "loss_curve.png",
    "ranks.png",
    "confusion.png",
    "adapter",
    "checkpoints",
)

#: Settings that a run chooses by its data where they are left out, and writes to ``run.yaml``.
CHOSEN_SETTINGS = ("train.epochs", "train.lr")
#: Settings that do not change the result: they may differ between an interrupted run and the run that resumes it.
FREE_SETTINGS = (
    "out",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.non_finite",
    "train.spike",
    "train.spectrum",
)


def check_run_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check that a run may write to ``folder``; creates nothing.

    Raises:
        OutputError: The folder is a file, cannot be written to, or holds parts of a run without its settings.
    """
    present = [name for name in FILES if exists(folder / name)]
    if present and not (overwrite or is_run(folder)):
        what = "cannot be resumed" if resume else "is no run that could go on"
        raise OutputError(
            f"{folder} holds {', '.join(present)} but no run.yaml, so it {what}",
            "replace it with --overwrite, or choose another --out",
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if exists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}: {existing}",
            "choose a folder that you may write to with --out",
        ) from None


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run, finished or not; a run that was killed before it began has left none."""
    return exists(folder / "run.yaml")


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a finished run, with its figures and its adapter."""
    return is_run(folder) and exists(folder / "summary.json") and is_dir(folder / "adapter")


def folder_of(file: str | Path, out: str) -> str:
    """Return the folder to resume in: the one of the ``run.yaml`` given, if the run was moved or copied there.

    Args:
        file: The file of settings.
        out: The folder that the settings name.
    """
    here = Path(file).parent
    other = Path(file).name == "run.yaml" and here.resolve() != Path(out).resolve()
    return str(here) if other and any(exists(here / name) for name in ("checkpoints", "metrics.jsonl")) else out


def refuse_other_settings(config: RunConfig, folder: Path, *, resume: bool = True) -> None:
    """Refuse to continue a run with settings that it was not started with.

    Args:
        config: The settings.
        folder: Folder of the run.
        resume: Whether the user asks to resume, and not for a run in a folder that happens to hold one.

    Raises:
        TrainingError, OutputError: Settings differ; the message names each of them.
    """
    if not (changed := changed_settings(config, folder)):
        return
    own = f"lorakeet train {folder / 'run.yaml'} --resume"
    if resume:
        raise TrainingError(
            f"the run in {folder} has other settings: {'; '.join(changed)}",
            f"resume with its own: {own}; or with these: --resume-anyway",
        )
    raise OutputError(
        f"{folder} already holds a run with other settings: {'; '.join(changed)}",
        f"replace it with --overwrite, choose another --out, or resume with its own settings: {own}",
    )


def changed_settings(config: RunConfig, folder: Path) -> list[str]:
    """Describe each setting that changes the result and differs between the run in ``folder`` and ``config``."""
    then, now = (_flat(c.model_dump(mode="json")) for c in (read_run(folder / "run.yaml"), config))
    free = {*FREE_SETTINGS} - ({"train.eval_every"} if config.train.load_best else set())
    return [
        f"{key} was {then[key]}, is {now[key]}"
        for key in now
        if then[key] != now[key] and key not in free and not (now[key] is None and key in CHOSEN_SETTINGS)
    ]


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read the ``summary.json`` of a finished run.

    Raises:
        OutputError: The folder holds no finished run, or its summary is damaged.
    """
    path = Path(folder) / "summary.json"
    if not exists(path):
        raise OutputError(f"{folder} holds no finished run", "finish it with `lorakeet train ... --resume`")
    try:
        return read_object(path)
    except (JsonError, OSError) as error:
        raise OutputError(
            f"{path} is damaged, expected the figures of a run as JSON: {error}", "repeat the run with --overwrite"
        ) from None


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    pairs = ([(f"{a}.{b}", v) for b, v in s.items()] if isinstance(s, dict) else [(a, s)] for a, s in tree.items())
    return dict(chain.from_iterable(pairs))


def claim_folder(folder: Path, config: RunConfig, *, resume: bool, need: int = 0) -> None:
    """Make the folder this run's: remove the files of an earlier run, and write ``run.yaml``.

    Args:
        folder: The run's folder; made if it does not exist.
        config: Settings of the run.
        resume: Keep the files that are there, but not what a killed process left half written.
        need: Bytes that the run will write.

    Raises:
        OutputError: The folder is not writable, or its disk has less free space.
    """
    check_output(folder, need)
    clear_aside(folder, FILES)
    clear_aside(folder / "checkpoints", ["*"])
    if not resume:
        for name in FILES:
            _remove(folder / name)
    with write_file(folder / "run.yaml") as aside:
        aside.write_text(f"# lorakeet train {folder / 'run.yaml'}\n{config.to_yaml()}", encoding="utf-8")


def _remove(path: Path) -> None:
    """Remove a file or folder; a link stays, and what it points to is removed or emptied."""
    if not is_dir(path):
        Path(os.path.realpath(path)).unlink(missing_ok=True)
        return
    for entry in contents(path):
        shutil.rmtree(entry) if is_dir(entry) and not entry.is_symlink() else entry.unlink()
    if not path.is_symlink() and not path.is_mount():
        path.rmdir()
