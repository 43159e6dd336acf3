"""Free memory of a device: of a GPU, or of the machine and the containers that this process runs in."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lorakeet.security.paths import exists

#: Files in which Linux reports memory: of the machine, the control groups of this process, and their limits.
_MACHINE, _MEMBER, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: Files of a control group, version 2: limit, use; and the line of memory.stat with the part that could be dropped.
_V2 = ("memory.max", "memory.current", "inactive_file")
#: The same, version 1.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes on ``device`` for this process, one of several alike on this machine; None if unknown.

    On a GPU this is what is free, and what torch holds without using it. On a CPU it is what Linux calls available.
    The limit of a control group (a container) bounds it, and the processes share it evenly.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not exists(_MACHINE):
        return None
    line = next(line for line in _MACHINE.read_text().splitlines() if line.startswith("MemAvailable:"))
    available = min([int(line.split()[1]) * 1024, *_left_of_limits(_MEMBER, _GROUPS)])
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_of_limits(member: Path, root: Path) -> list[int]:
    """Return the bytes that the limit of each control group of this process leaves; empty without control groups."""
    if not exists(member):
        return []
    found = []
    for line in member.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top, names = (root / "memory", _V1) if controllers else (root, _V2)
            folder = top / path.lstrip("/")
            depth = len(folder.relative_to(top).parts)
            groups = [folder, *folder.parents][: depth + 1]  # each group bounds those in it
            found += [left for group in groups if (left := _left_of_limit(group, *names)) is not None]
    return found


def _left_of_limit(folder: Path, limit: str, use: str, droppable: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / use).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # this container does not see the group
        return None
    return None if most == "max" else max(int(most) - used + int(stat.get(droppable, 0)), 0)
