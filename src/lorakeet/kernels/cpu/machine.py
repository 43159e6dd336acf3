"""Facts about this machine that decide how fast it computes, for people."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from lorakeet.kernels.cpu import build, features, threads
from lorakeet.security.paths import exists


def describe_machine() -> dict[str, str]:
    """Return the processor, its features, the state of the compiled loops and the threads, each in words."""
    loaded = build.library()
    checked = "nothing is compiled, or it is switched off: torch computes"
    if loaded is not None:
        checked = (
            f"switched off: {', '.join(loaded.differing)}" if loaded.differing else "every compiled product is right"
        )
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "features": " ".join(sorted(features.detected())) or "none",
        "compiled loops": build.library_version(),
        "self-check": checked,
        "threads": str(torch.get_num_threads()),
        "idle threads wait": threads.waiting(),
    }


def processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if exists(cpuinfo) else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
