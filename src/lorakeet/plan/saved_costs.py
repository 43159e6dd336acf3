"""Measured costs of passes, kept in the cache folder: the calibration of this machine.

A cost belongs to the processor, the number of threads, torch, the compiled loops, and everything that decides the pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorakeet._version import __version__
from lorakeet.errors import OutputError
from lorakeet.files import cache_home, write_file
from lorakeet.kernels.cpu import build
from lorakeet.plan.pass_cost import Part
from lorakeet.security.paths import exists


def machine() -> dict[str, Any]:
    """Return what decides the speed of this machine, and the versions that compute on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if exists(cpuinfo) else []
    library = build.library()
    return {
        "processor": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loops": None if library is None else Path(getattr(library, "_name", "")).name,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "lorakeet": __version__,
    }


def saved_parts(key: Mapping[str, Any], measure: Callable[[], list[Part]]) -> list[Part]:
    """Return the parts of a pass from the cache, or measure them and keep them there.

    Args:
        key: What decides the cost, apart from the machine.
        measure: Measures them.
    """
    text = json.dumps([machine(), key], sort_keys=True, default=str)
    path = cache_home() / "plans" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, TypeError):
        return [Part(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    parts = measure()
    with suppress(OSError, OutputError):  # a cache that cannot be written costs time only
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_file(path) as aside:
            aside.write_text(json.dumps([asdict(part) for part in parts]), encoding="utf-8")
    return parts
