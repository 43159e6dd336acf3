"""How many bytes this process could still take: of a GPU, or of the machine and of the groups that bound it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

#: Where Linux tells of memory: of the machine, of the groups that this process is in, and of these groups' limits.
_MACHINE, _MEMBER, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: Limit, use, and what of the use could be dropped (a line of memory.stat): control groups version 2 and version 1.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on ``device`` for this process, one of several alike on this machine; None if nobody can tell.

    Of a GPU that is what is free and what torch holds without using it. Of a CPU it is what Linux calls available, or what
    is left of the limit of a control group (a container) where that is less, shared evenly among the processes.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not _MACHINE.exists():
        return None
    line = next(line for line in _MACHINE.read_text().splitlines() if line.startswith("MemAvailable:"))
    available = min([int(line.split()[1]) * 1024, *_left_of_limits(_MEMBER, _GROUPS)])
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_of_limits(member: Path, root: Path) -> list[int]:
    """What is left of the limit of each control group that this process is in, where there are any."""
    if not member.exists():
        return []
    found = []
    for line in member.read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            top, names = (root / "memory", _V1) if kinds else (root, _V2)
            folder = top / path.lstrip("/")
            depth = len(folder.relative_to(top).parts)
            inside = [folder, *folder.parents][: depth + 1]  # each group bounds those in it
            found += [left for each in inside if (left := _left_of_limit(each, *names)) is not None]
    return found


def _left_of_limit(folder: Path, limit: str, use: str, droppable: str) -> int | None:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / use).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # no such group in this container's view
        return None
    return None if most == "max" else max(int(most) - used + int(stat.get(droppable, 0)), 0)
