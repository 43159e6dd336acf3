"""Cache of transformers over pages: a batch of rows, each with the pages of its own sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lorakeet.serve.cache.pages import Pages


class PagedCache(Cache):
    """Keys and values of one step: the new tokens are written to the pages, and all of a row are read from them.

    Rows are padded on the right. :meth:`mask` hides what is behind a row's last token.
    """

    def __init__(self, pages: Pages, tables: Sequence[Sequence[int]], past: Sequence[int], new: int) -> None:
        """Compute the places of a step's tokens.

        Args:
            pages: The pool.
            tables: Pages of each row, enough for the new tokens too.
            past: Tokens of each row whose keys and values are stored.
            new: New tokens of each row.
        """
        rows = _Rows(pages, tables, past, new)
        super().__init__(layers=[_PagedLayer(rows, layer) for layer in range(len(pages.keys))])
        self.rows = rows

    def mask(self) -> Tensor | None:
        """Return the mask of visible keys, int64 [rows, longest]; None if all rows have the same length."""
        return self.rows.mask()


class _Rows:
    """Places of a batch's tokens in the pool, the same in all layers."""

    def __init__(self, pages: Pages, tables: Sequence[Sequence[int]], past: Sequence[int], new: int) -> None:
        self.pages, self.past, self.new = pages, list(past), new
        self.longest = max(past) + new
        device, size = pages.keys.device, pages.page_tokens
        most = pages.needed(self.longest)
        # a row with fewer pages repeats its first one: the mask hides it, and its values are finite, as those of its
        # further pages, which were not cleared yet, need not be
        used = [table[: pages.needed(length + new)] for table, length in zip(tables, past, strict=True)]
        padded = [[*table, *[table[0]] * (most - len(table))] for table in used]
        self.table = torch.tensor(padded, device=device)  # [rows, most]
        places = torch.tensor(self.past, device=device)[:, None] + torch.arange(new, device=device)  # [rows, new]
        self.write_pages = self.table.gather(1, places // size).flatten()
        self.write_offsets = (places % size).flatten()
        self.positions = places

    def mask(self) -> Tensor | None:
        if len(set(self.past)) == 1:
            return None
        ends = torch.tensor([length + self.new for length in self.past], device=self.table.device)
        return (torch.arange(self.longest, device=self.table.device) < ends[:, None]).long()

    def write(self, store: Tensor, values: Tensor) -> None:
        """Write new keys or values.

        Args:
            store: Of one layer, [count, heads, page_tokens, head_dim].
            values: [rows, heads, new, head_dim].
        """
        flat = values.transpose(1, 2).flatten(0, 1).to(store.dtype)  # [rows · new, heads, head_dim]
        store[self.write_pages, :, self.write_offsets] = flat

    def read(self, store: Tensor) -> Tensor:
        """Return all keys or values of the rows, [rows, heads, longest, head_dim]."""
        found = store[self.table].transpose(1, 2).flatten(2, 3)  # [rows, heads, most · page_tokens, head_dim]
        return found[:, :, : self.longest]


class _PagedLayer(CacheLayerMixin):
    """Layer of the cache."""

    is_sliding = False

    def __init__(self, rows: _Rows, layer: int) -> None:
        super().__init__()
        self.rows = rows
        self.layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keep all as it is: the pages are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, and return all of each row."""
        keys, values = self.rows.pages.keys[self.layer], self.rows.pages.values[self.layer]
        self.rows.write(keys, key_states)
        self.rows.write(values, value_states)
        return self.rows.read(keys), self.rows.read(values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.longest, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens before the new ones, of the longest row: where a query is in the mask."""
        return self.rows.longest - self.rows.new

    def get_max_length(self) -> int:
        return -1
