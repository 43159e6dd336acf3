"""A run's folder: may it be used, whose is it, what does it hold."""

from __future__ import annotations

import shutil
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import OutputError, TrainingError
from lorakeet.files import check_output, write_file

#: What a run writes.
FILES = ("run.yaml", "metrics.jsonl", "summary.json", "loss_curve.png", "confusion.png", "adapter", "checkpoints")

#: Settings that only look: they may differ between the run that was stopped and the one that goes on.
LOOKING = ("out", "train.log_every", "train.eval_every", "train.save_every")


def check_run_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Whether a run may write to ``folder``; makes nothing.

    Raises:
        OutputError: it is a file, cannot be written to, holds a run already, or holds none to resume.
    """
    held = [name for name in FILES if (folder / name).exists()]
    if resume and "run.yaml" not in held:
        raise OutputError(f"{folder} holds no run to resume", "leave --resume out to start one")
    if resume and "summary.json" in held:
        raise OutputError(f"the run in {folder} is finished", "repeat it with --overwrite, or choose another --out")
    if held and not (resume or overwrite):
        raise OutputError(
            f"{folder} already holds a run ({', '.join(held)})",
            "go on with --resume, replace it with --overwrite, or choose another --out",
        )
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}: {there}",
            "choose a folder you may write to with --out",
        ) from None


def refuse_other_settings(config: RunConfig, folder: Path) -> None:
    """Only the settings that a run was started with may go on with it.

    Raises:
        TrainingError: names every setting that differs.
    """
    then, now = (_flat(c.model_dump(mode="json")) for c in (read_run(folder / "run.yaml"), config))
    changed = [f"{key} was {then[key]}, is {now[key]}" for key in now if then[key] != now[key] and key not in LOOKING]
    if changed:
        raise TrainingError(
            f"the run in {folder} has other settings: {'; '.join(changed)}",
            f"go on with its own: lorakeet train {folder / 'run.yaml'} --resume",
        )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    pairs = ([(f"{a}.{b}", v) for b, v in s.items()] if isinstance(s, dict) else [(a, s)] for a, s in tree.items())
    return dict(chain.from_iterable(pairs))


def claim_folder(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """From here on the folder is this run's: clear what an earlier one left, say what this one is."""
    check_output(folder)
    if not resume:
        for name in FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with write_file(folder / "run.yaml") as aside:
        aside.write_text(f"# lorakeet train {folder / 'run.yaml'}\n{config.to_yaml()}", encoding="utf-8")
