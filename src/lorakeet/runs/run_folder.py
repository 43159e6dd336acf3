"""The folder of a run: checks before a run uses it, ``run.yaml`` and ``summary.json``."""

from __future__ import annotations

import json
import shutil
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import OutputError, TrainingError
from lorakeet.files import check_output, write_file

#: Files and folders that a run writes.
FILES = ("run.yaml", "metrics.jsonl", "summary.json", "loss_curve.png", "confusion.png", "adapter", "checkpoints")

#: Settings that do not change the result: they may differ between an interrupted run and the run that resumes it.
FREE_SETTINGS = ("out", "train.log_every", "train.eval_every", "train.save_every")


def check_run_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check that a run may write to ``folder``; creates nothing.

    Raises:
        OutputError: The folder is a file, cannot be written to, holds a run already, or holds none to resume.
    """
    present = [name for name in FILES if (folder / name).exists()]
    if resume and "run.yaml" not in present:
        raise OutputError(f"{folder} holds no run to resume", "start a run without --resume")
    if resume and "summary.json" in present:
        raise OutputError(f"the run in {folder} is finished", "repeat it with --overwrite, or choose another --out")
    if present and not (resume or overwrite):
        raise OutputError(
            f"{folder} already holds a run ({', '.join(present)})",
            "resume it with --resume, replace it with --overwrite, or choose another --out",
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}: {existing}",
            "choose a folder that you may write to with --out",
        ) from None


def refuse_other_settings(config: RunConfig, folder: Path) -> None:
    """Refuse to resume a run with settings that it was not started with.

    Raises:
        TrainingError: Settings differ; the message names each of them.
    """
    then, now = (_flat(c.model_dump(mode="json")) for c in (read_run(folder / "run.yaml"), config))
    changed = [
        f"{key} was {then[key]}, is {now[key]}" for key in now if then[key] != now[key] and key not in FREE_SETTINGS
    ]
    if changed:
        raise TrainingError(
            f"the run in {folder} has other settings: {'; '.join(changed)}",
            f"resume with its own: lorakeet train {folder / 'run.yaml'} --resume",
        )


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Read the ``summary.json`` of a finished run.

    Raises:
        OutputError: The folder holds no finished run.
    """
    path = Path(folder) / "summary.json"
    if not path.exists():
        raise OutputError(f"{folder} holds no finished run", "finish it with `lorakeet train ... --resume`")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    pairs = ([(f"{a}.{b}", v) for b, v in s.items()] if isinstance(s, dict) else [(a, s)] for a, s in tree.items())
    return dict(chain.from_iterable(pairs))


def claim_folder(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """Make the folder this run's: remove the files of an earlier run, and write ``run.yaml``."""
    check_output(folder)
    if not resume:
        for name in FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with write_file(folder / "run.yaml") as aside:
        aside.write_text(f"# lorakeet train {folder / 'run.yaml'}\n{config.to_yaml()}", encoding="utf-8")
