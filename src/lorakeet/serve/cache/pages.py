"""Pool of key-value pages: each holds the keys and values of a few consecutive tokens, in all layers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class Pages:
    """A fixed number of pages with reference counts. A page that is shared is never written to.

    Attributes:
        keys: [layers, count, key-value heads, page_tokens, head_dim]; contiguous, so a head of a page is one run of memory.
        values: The same for the values.
        page_tokens: Tokens of a page.
    """

    def __init__(
        self,
        layers: int,
        count: int,
        kv_heads: int,
        page_tokens: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, count, kv_heads, page_tokens, head_dim)
        self.keys, self.values = (_zeros(shape, dtype, torch.device(device)) for _ in range(2))
        self.page_tokens = page_tokens
        self._references = [0] * count
        self._free = list(range(count - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        """Number of pages that nothing refers to."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Return the number of pages for this number of tokens."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int, clear: bool = True) -> list[int]:
        """Take free pages, each with one reference; there must be enough.

        Args:
            count: Number of pages.
            clear: Whether to fill them with zeros. It takes a while for many; without, :meth:`clear` each one before its
                first token is stored.
        """
        if count > len(self._free):
            raise ValueError(f"{count} pages are wanted, {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        if clear:
            self.clear(taken)
        for page in taken:
            self._references[page] = 1
        return taken

    def clear(self, pages: Iterable[int]) -> None:
        """Fill pages with zeros: positions behind a sequence's end are masked, and a masked NaN would still spoil a sum."""
        for page in pages:
            self.keys[:, page] = 0
            self.values[:, page] = 0

    def references(self, page: int) -> int:
        """Return the number of references to a page."""
        return self._references[page]

    def share(self, page: int) -> None:
        """Add a reference to a page that has one."""
        if not self._references[page]:
            raise ValueError(f"page {page} is free")
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Give a reference back; the page is free with the last one."""
        if not self._references[page]:
            raise ValueError(f"page {page} is free already")
        self._references[page] -= 1
        if not self._references[page]:
            self._free.append(page)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. On a CPU they take no memory, and no time, before something is written to them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
