"""Start of a run whose folder holds one already: it goes on from a checkpoint, is finished, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.errors import OutputError, TrainingError
from lorakeet.log import info
from lorakeet.runs.run_folder import changed_settings, is_run, read_summary, refuse_other_settings
from lorakeet.security.paths import is_dir
from lorakeet.train.checkpoints.manifest import checkpoints, latest_checkpoint, remove_checkpoints


def checkpoint_to_continue(
    config: RunConfig, folder: Path, *, resume: bool, overwrite: bool, any_checkpoint: bool
) -> Path | None:
    """Return the checkpoint from which the run in ``folder`` goes on; None: a run starts from the beginning.

    Args:
        config: Settings of the run, as the user gives them.
        folder: The run's folder.
        resume: Whether the user asks to resume; without it, a run of the same settings goes on too.
        overwrite: Whether the run in the folder is replaced.
        any_checkpoint: Whether the run in the folder may have other settings.

    Raises:
        TrainingError, OutputError: The run in the folder has other settings, or all of its checkpoints are damaged.
    """
    if overwrite:
        return None
    if not is_run(folder):
        if resume:
            info(f"no run in {folder} yet: starting from the beginning")
        return None
    if not any_checkpoint:
        refuse_other_settings(config, folder, resume=resume)
    place = folder / "checkpoints"
    newest = latest_checkpoint(place)
    if newest is None and checkpoints(place):
        raise TrainingError(
            f"all checkpoints in {place} are damaged, so the run cannot go on",
            "start again with --overwrite; the adapter in a checkpoint may still load: --init-adapter CHECKPOINT",
        )
    if newest is None:
        info(f"the run in {folder} stopped before its first checkpoint: starting from the beginning")
    else:
        info(f"continuing the run in {folder} after step {newest.name.rpartition('-')[2]}, from {newest}")
    return newest


def finished_summary(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Return the figures of the finished run in ``folder``, to which nothing is added.

    Raises:
        OutputError: It has other settings, or its figures are damaged.
    """
    if changed := changed_settings(config, folder):
        raise OutputError(
            f"{folder} already holds a finished run with other settings: {'; '.join(changed)}",
            f"replace it with --overwrite, choose another --out, or train further with --init-adapter {folder}",
        )
    summary = read_summary(folder)
    info(f"the run in {folder} is finished, so nothing is trained; --overwrite repeats it")
    return summary


def remove_what_only_resumes(config: RunConfig, folder: Path) -> None:
    """Remove the checkpoints of a finished run, unless its settings ask for checkpoints."""
    if config.train.save_every is None and not (config.train.keep_best or config.train.load_best):
        place = folder / "checkpoints"
        remove_checkpoints(checkpoints(place).values())
        if is_dir(place) and not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()
