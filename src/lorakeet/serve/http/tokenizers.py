"""Tokenizers of the served adapters: an adapter renders conversations with the template that it was taught with."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

from lorakeet.adapter.vocabulary import TOKENIZER_PATTERNS, adapter_tokenizer
from lorakeet.lora.lifecycle.adapter_files import adapter_folder
from lorakeet.security.paths import is_dir, is_file
from lorakeet.serve.engine.residents import Residents

#: Files of an adapter that decide nothing about its tokenizer.
_OTHERS = ("adapter_config.json", "lorakeet.json")


class Tokenizers:
    """Tokenizers by adapter; adapters with the same files share one, and those without files have the base's."""

    def __init__(self, own: Any, residents: Residents) -> None:
        self.own, self._residents = own, residents
        self._by_version: dict[int, str | None] = {}
        self._by_files: dict[str, Any] = {}
        self._lock = threading.Lock()

    def of(self, adapter: str | None) -> Any:
        """Return the tokenizer of an adapter; None: that of the base.

        Raises:
            AdapterError: Its files are damaged.
        """
        served = {resident.name: resident for resident in self._residents.list()}
        if adapter not in served:
            return self.own
        resident = served[adapter]
        with self._lock:
            self._forget({one.version for one in served.values()})
            if resident.version not in self._by_version:
                self._by_version[resident.version] = self._add(resident.source)
            key = self._by_version[resident.version]
            return self.own if key is None else self._by_files[key]

    def _add(self, source: str) -> str | None:
        key = _files_key(source)
        if key is not None and key not in self._by_files:
            tokenizer = adapter_tokenizer(source)
            if tokenizer is None or _same(tokenizer, self.own):
                return None
            self._by_files[key] = tokenizer
        return key

    def _forget(self, versions: set[int]) -> None:
        """Drop the tokenizers of versions that are no longer served."""
        self._by_version = {version: key for version, key in self._by_version.items() if version in versions}
        kept = set(self._by_version.values())
        self._by_files = {key: tokenizer for key, tokenizer in self._by_files.items() if key in kept}


def _files_key(source: str) -> str | None:
    """Return a hash of the files of a tokenizer; None if there are none."""
    folder = Path(adapter_folder(source))
    if not is_dir(folder):
        return source  # of the hub
    files = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern) if is_file(path)}
    found = sorted(path for path in files if path.name not in _OTHERS)
    if not any(path.name == "tokenizer_config.json" for path in found):
        return None
    parts = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in found]
    return "\n".join(parts)


def _same(one: Any, other: Any) -> bool:
    """Whether two tokenizers render and tokenize alike, as far as their templates and vocabularies tell."""
    return one.chat_template == other.chat_template and one.get_vocab() == other.get_vocab()
