"""Forward passes of the engine: what one is, and the plain one over any causal model of transformers.

A step computes pieces of several sequences. Pieces of one token run together, each row over its own pages and with its own
adapter; longer pieces, of prompts, run one by one.
"""

from __future__ import annotations

import inspect
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lorakeet.errors import AdapterError
from lorakeet.lora.lifecycle.adapter_names import BARE
from lorakeet.lora.model import LoraModel
from lorakeet.serve.cache.paged_cache import PagedCache
from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.engine.residents import MakeUpdate, Resident


@dataclass(eq=False)
class Sequence:
    """Tokens of one request whose keys and values are stored.

    Attributes:
        adapter: The adapter that computes all of them; None: the base.
        pages: Pages in order; there may be more than the tokens need so far.
        length: Number of tokens whose keys and values are stored. The engine adds the tokens of a piece after the step.
        state: What a forward pass without pages keeps for the sequence.
    """

    adapter: Resident | None = None
    pages: list[int] = field(default_factory=list)
    length: int = 0
    state: Any = None


class Piece(NamedTuple):
    """Next tokens of a sequence.

    Attributes:
        sequence: The sequence; its pages have room for the tokens.
        ids: Token ids, at least one.
    """

    sequence: Sequence
    ids: list[int]


class Forward(Protocol):
    """A forward pass of one step.

    Attributes:
        pages: The pool that it writes to; None: it keeps its own state for each sequence.
    """

    pages: Pages | None

    def run(self, pieces: abc.Sequence[Piece]) -> Tensor:
        """Store all keys and values, and return the logits of each piece's last token, fp32 [pieces, vocabulary]."""

    def own_copy(self, layers: abc.Sequence[str], update: MakeUpdate) -> Any:
        """Return a copy of an adapter by which its rows are computed, so that it need not be in the model; None: it need.

        Args:
            layers: Names of linear layers, the only ones with an update.
            update: Function that returns the update of each.
        """

    def get_ready(self, adapter: Resident) -> None:
        """Make ready what rows of an adapter in the model need, so that no step has to; in any thread, while steps run."""


class PlainForward:
    """The reference: the model's own forward, with a cache of transformers over pages."""

    def __init__(self, model: Any, pages: Pages, batched: bool = True) -> None:
        """Serve a model.

        Args:
            model: The model, with adapters or without.
            pages: The pool.
            batched: Whether single tokens of several sequences run in one batch; False: row by row.
        """
        self.model = model
        self.batched = batched
        self.pages: Pages | None = pages
        self._pool = pages
        self._arguments = forward_arguments(model)

    def run(self, pieces: abc.Sequence[Piece]) -> Tensor:
        logits: list[Tensor | None] = [None] * len(pieces)
        for chosen in _batches(pieces) if self.batched else [[index] for index in range(len(pieces))]:
            for index, row in zip(chosen, self._run_batch([pieces[index] for index in chosen]), strict=True):
                logits[index] = row
        return torch.stack([row for row in logits if row is not None])

    def own_copy(self, layers: abc.Sequence[str], update: MakeUpdate) -> None:
        """Return None: the model computes all adapters."""

    def get_ready(self, adapter: Resident) -> None:
        """Keep things as they are: the model has the adapter."""

    def _run_batch(self, batch: abc.Sequence[Piece]) -> Tensor:
        """Run pieces of the same number of tokens; by adapter, if a layer cannot tell the rows apart."""
        adapters = [piece.sequence.adapter for piece in batch]
        try:
            with acting(self.model, adapters):
                return self._run_rows(batch)
        except AdapterError:  # a layer inside of an expert, which gets some of the rows
            mixing = [one for one in adapters if one is not None and one.mixes]
            if not mixing:
                raise
            for one in mixing:
                one.mixes = False
            return self.run(batch)

    def _run_rows(self, batch: abc.Sequence[Piece]) -> Tensor:
        past = [piece.sequence.length for piece in batch]
        cache = PagedCache(self._pool, [piece.sequence.pages for piece in batch], past, len(batch[0].ids))
        device = self._pool.keys.device
        given = {
            "input_ids": torch.tensor([piece.ids for piece in batch], device=device),
            "attention_mask": cache.mask(),
            "position_ids": cache.rows.positions,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self.model(**{name: value for name, value in given.items() if name in self._arguments})
        rows: Tensor = output.logits[:, -1].float()
        return rows


def forward_arguments(model: Any) -> frozenset[str]:
    """Return the names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


@contextmanager
def acting(model: Any, adapters: abc.Sequence[Resident | None]) -> Iterator[None]:
    """Let each row of a batch have its adapter inside the block; a batch of base rows costs nothing more."""
    if not isinstance(model, LoraModel):
        yield
        return
    names = tuple(BARE if one is None else one.slot for one in adapters)
    if set(names) == {BARE}:
        with model.switch.disabled():
            yield
    elif len(set(names)) == 1:
        before, model.switch.active = model.switch.active, names[:1]
        try:
            yield
        finally:
            model.switch.active = before
    else:
        with model.switch.by_row(names):
            yield


def _batches(pieces: abc.Sequence[Piece]) -> list[list[int]]:
    """Return the indices of the pieces that run together: single tokens by adapter, longer pieces each alone.

    An adapter that cannot tell rows apart runs in a batch of its own.
    """
    single = [index for index, piece in enumerate(pieces) if len(piece.ids) == 1]
    batches: dict[Any, list[int]] = {}
    for index in sorted(single, key=lambda index: _slot(pieces[index])):
        adapter = pieces[index].sequence.adapter
        batches.setdefault(None if adapter is None or adapter.mixes else adapter.slot, []).append(index)
    return [*batches.values(), *([index] for index, piece in enumerate(pieces) if len(piece.ids) > 1)]


def _slot(piece: Piece) -> str:
    return "" if piece.sequence.adapter is None else piece.sequence.adapter.slot
