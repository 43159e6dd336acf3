"""The one map between a model's adapters and their folders: used by saving, loading, resuming and rehearsals.

``default`` lies in the folder itself, every other adapter in a subfolder of its name, as in PEFT.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from lorakeet.errors import AdapterError
from lorakeet.lora.config import CONFIG_NAME
from lorakeet.lora.lifecycle.adapter_names import CHECKPOINT, check_adapter_name
from lorakeet.security.paths import is_file, matching

#: Name of the adapter that lies in the folder itself; PEFT's.
DEFAULT = "default"


def adapter_folder(root: str | Path, adapter: str) -> Path:
    """Return the folder of one adapter of a model that is saved in ``root``.

    Raises:
        AdapterError: the name cannot be a folder's, so the path could lead out of ``root``.
    """
    check_adapter_name(adapter)
    return Path(root) if adapter == DEFAULT else Path(root) / adapter


def adapter_folders(root: str | Path, adapters: Iterable[str]) -> dict[str, Path]:
    """Return the folder of each adapter of a model that is saved in ``root``.

    Raises:
        AdapterError: a name cannot be a folder's, or two names are one on file systems that ignore case.
    """
    folders = {adapter: adapter_folder(root, adapter) for adapter in adapters}
    seen: dict[str, str] = {}
    for adapter in folders:
        other = seen.setdefault(unicodedata.normalize("NFC", adapter).casefold(), adapter)
        if other != adapter:
            raise AdapterError(
                f"adapters {other!r} and {adapter!r} would share a folder on file systems that ignore case",
                "save them into different folders, with selected_adapters",
            )
    return folders


def saved_adapters(root: str | Path) -> dict[str, Path]:
    """Find the adapters that lie in ``root``, by name; checkpoints and temporary folders do not count."""
    root = Path(root)
    inner = sorted(path for path in matching(root, "*") if is_file(path / CONFIG_NAME))
    named = {path.name: path for path in inner if path.name[0] != "." and not CHECKPOINT.fullmatch(path.name)}
    return ({DEFAULT: root} if is_file(root / CONFIG_NAME) else {}) | named
