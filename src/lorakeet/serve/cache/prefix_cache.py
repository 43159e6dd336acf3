"""Prefix cache: full pages of finished prompts and answers, found again by what they depend on.

The key of a page is a hash of the key of the page before and of its tokens. The first one's hash begins with the base, the
adapter's files and its scale. So a page is never found for another adapter, version or scale, whatever the tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorakeet.serve.cache.pages import Pages


def prefix_root(base: str, adapter: str, scale: float) -> bytes:
    """Return the hash that a chain begins with.

    Args:
        base: Fingerprint of the base.
        adapter: Digest of the adapter's files; empty for the base.
        scale: Factor of the adapter's update.
    """
    return hashlib.sha256(f"{base}\n{adapter}\n{scale!r}".encode()).digest()


def chain(root: bytes, tokens: Sequence[int], page_tokens: int) -> list[bytes]:
    """Return the keys of the full pages that these tokens fill."""
    keys, last, size = [], root, 8 * page_tokens
    data = np.asarray(tokens, "<i8").tobytes()
    for start in range(0, len(data) - size + 1, size):
        last = hashlib.sha256(last + data[start : start + size]).digest()
        keys.append(last)
    return keys


@dataclass
class _Entry:
    page: int
    children: int = 0  # entries whose chain goes through this one
    parent: bytes | None = None


class PrefixCache:
    """Pages by key, least recently used out first. The cache has one reference to each of its pages."""

    def __init__(self, pages: Pages, limit: int | None = None) -> None:
        self.pages = pages
        self.limit = len(pages) if limit is None else limit
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, key: bytes) -> bool:
        """Whether the page of a key is here."""
        return key in self._entries

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Return the pages of the longest known beginning of a chain, each with a further reference for the caller."""
        found = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                break
            self.pages.share(entry.page)
            found.append(entry.page)
        self._touch(keys[: len(found)])
        return found

    def keep(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """Keep full pages by their keys; a key that is known keeps its page.

        Args:
            keys: A chain from its beginning.
            pages: The page of each key.
        """
        parent: bytes | None = None
        for key, page in zip(keys, pages, strict=True):
            if key not in self._entries:
                self.pages.share(page)
                self._entries[key] = _Entry(page, parent=parent)
                if parent is not None:
                    self._entries[parent].children += 1
            parent = key
        self._touch(keys)
        while len(self._entries) > self.limit and self._drop_oldest(unused_only=False):
            pass

    def make_room(self, count: int) -> bool:
        """Drop pages that only the cache refers to until ``count`` are free; whether there are that many then."""
        while self.pages.free < count:
            if not self._drop_oldest(unused_only=True):
                return False
        return True

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark a chain as just used; its end is older than its beginning, since it is dropped first."""
        for key in reversed(keys):
            self._entries.move_to_end(key)

    def _drop_oldest(self, unused_only: bool) -> bool:
        """Drop the least recently used page that no other one follows; whether there was one.

        Args:
            unused_only: Leave pages alone that a sequence refers to, since they would not become free.
        """
        for key, entry in self._entries.items():
            if entry.children == 0 and not (unused_only and self.pages.references(entry.page) > 1):
                del self._entries[key]
                if entry.parent is not None:
                    self._entries[entry.parent].children -= 1
                self.pages.release(entry.page)
                return True
        return False
