"""A process that cannot find ``peft``; imports nothing that could have looked for it already."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from typing import Any


def hide_peft() -> None:
    """Let this process find no ``peft``: neither the package nor its metadata."""

    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == "peft":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    real_spec, real_version = importlib.util.find_spec, importlib.metadata.version

    def find_spec(name: str, *rest: Any) -> importlib.machinery.ModuleSpec | None:
        return None if name.partition(".")[0] == "peft" else real_spec(name, *rest)

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
    importlib.util.find_spec, importlib.metadata.version = find_spec, version
