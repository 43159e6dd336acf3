"""Record of the comparison of the compiled pass with a base's own forward, so that later starts need not repeat it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakeet.errors import LorakeetError
from lorakeet.files import cache_home, write_json
from lorakeet.kernels.cpu.build import library_version
from lorakeet.security.paths import exists, paths_below

#: Folder of this package, whose sources are a part of what was compared.
_PACKAGE = Path(__file__).parents[2]
#: Rooms that the two passes are computed by.
_ROOMS = ("kernels", "quant", "serve", "lora")


class Agreement:
    """Record that the compiled pass of a base agreed on this machine, with the very same software."""

    def __init__(self, key: str) -> None:
        self._path = cache_home() / "passes" / f"{key}.json"

    @property
    def is_noted(self) -> bool:
        """Whether both passes were compared before, and agreed."""
        return exists(self._path)

    def note(self) -> None:
        """Write the record, where the cache can be written."""
        with suppress(OSError, LorakeetError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"agrees": True})


def agreement_of(config: Any, fingerprint: Mapping[str, Any] | None) -> Agreement | None:
    """Return the record of a base; None for one whose values are not known.

    Args:
        config: Configuration of the model.
        fingerprint: Of the base.
    """
    if fingerprint is None:
        return None
    software = [torch.__version__, transformers.__version__, library_version(), platform.node(), _sources()]
    software += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("LORAKEET_")]
    facts = [config.to_json_string(use_diff=False), fingerprint, software]
    return Agreement(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24])


def _sources() -> str:
    """Return a hash of the rooms that the two passes are computed by."""
    found = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in paths_below(_PACKAGE / room) if path.suffix == ".py"):
        found.update(path.read_bytes())
    return found.hexdigest()
