"""The plan at the start of a run: a few lines, and a warning where the run will not fit."""

from __future__ import annotations

import os
from typing import Any

import torch

from lorakeet.base.load import ModelInfo
from lorakeet.config import RunConfig, TaskSettings
from lorakeet.data.prepared import Prepared
from lorakeet.log import info, warn
from lorakeet.plan.plan import Plan
from lorakeet.plan.report import lines, size, without_checkpoints
from lorakeet.train.planning.plan_run import plan_run


def plan_at_start(
    config: RunConfig, found: ModelInfo, chosen: TaskSettings, data: Prepared, free: int | None
) -> Plan | None:
    """Plan a run, log the plan, and warn where the run will not fit; None where it cannot be planned, which never stops it.

    Args:
        config: Settings of the run; its length and learning rate are set.
        found: Configuration and tokenizer of the base.
        chosen: Settings of the task, whose type is concrete.
        data: Prepared data.
        free: Free bytes of the device; None if unknown.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        plan = plan_run(config, found, chosen, data, processes=processes, free=free)
    except Exception as error:  # foreign architectures fail in many ways, and errors of the run itself are raised later
        reason = " ".join(str(error).split())[:200]
        info(f"memory     is not known before the base is loaded ({type(error).__name__}: {reason})")
        return None
    for line in lines(plan):
        info(line)
    if config.train.gradient_checkpointing == "auto" and (said := without_checkpoints(plan)):
        info(said)
    if not plan.fits(plan.limit):
        warn(
            f"the run needs {size(plan.memory.peak)} and may not fit, {size(plan.limit or 0)} are free: "
            "`lorakeet plan` with the same settings and --fit finds what to change"
        )
    return plan


def same_in_all_processes(plan: Plan | None, accelerator: Any) -> int | None:
    """Return n of the layers to checkpoint, the least of all processes; None: no layer has to be."""
    wanted = plan.every if plan is not None else None
    none = 1 << 30
    every = torch.tensor([wanted or none], device=accelerator.device)
    least = int(accelerator.gather(every).min())
    return None if least == none else least
