"""Forward pass of the engine in compiled loops: rows of all sequences together, each by itself.

A row is a token. Its logits have the same bits alone and in company, and whatever pieces its prompt came in. Rows of an
adapter that the loops cannot compute take the plain pass, over the same pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorakeet.eval_mode import evaluating
from lorakeet.facts.vocabulary import embedding_rows
from lorakeet.kernels.cpu import abi
from lorakeet.kernels.paged import Rows, UpdateTable
from lorakeet.patches.verify import Verifier, is_close
from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.compiled.agreement import Agreement
from lorakeet.serve.compiled.layers import UnsupportedError, read_parts
from lorakeet.serve.compiled.updates import made_table, read_updates
from lorakeet.serve.engine.forward import Forward, Piece, PlainForward, acting
from lorakeet.serve.engine.forward import Sequence as Tokens
from lorakeet.serve.engine.residents import MakeUpdate, Resident

#: Share of the largest logit by which compiled and plain pass may differ: both round activations to 15 bits.
_NEAR = 5e-3
#: Tokens of the text by which the two passes are compared: more than a page, and enough that the model rounds too.
_TRIED = 40


class CompiledForward:
    """Forward pass of a model of the Llama family in 8 bits.

    Attributes:
        pages: The pool that it writes to.
        tables: Copies of adapters of the model in the layout of the loops; None for one that they cannot compute.
        agreement: Record that the pass was compared with the model's own forward; None: there is none.
    """

    def __init__(self, model: Any, pages: Pages) -> None:
        """Read the model.

        Args:
            model: The model; adapters may come and go later.
            pages: The pool.

        Raises:
            UnsupportedError: The compiled loops do not know the model, or the pool.
        """
        self.pages: Pages | None = pages
        if pages.keys.dtype != torch.float32 or not pages.keys.is_cpu or pages.page_tokens % abi.PAGE_STEP:
            raise UnsupportedError(
                f"pages are of {pages.page_tokens} tokens in {pages.keys.dtype} on {pages.keys.device}"
            )
        self._model, self._pool, self._parts = model, pages, read_parts(model)
        self._plain = PlainForward(model, pages)
        self.agreement: Agreement | None = None
        self.tables: WeakKeyDictionary[Resident, UpdateTable | None] = WeakKeyDictionary()

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Store keys and values of all tokens, and return the logits of each piece's last one, fp32 [pieces, vocabulary]."""
        tables = [self._table(piece.sequence.adapter) for piece in pieces]
        others = [index for index, table in enumerate(tables) if table is None]
        if not others:
            return self._run(pieces, tables)
        known = [index for index, table in enumerate(tables) if table is not None]
        made = torch.empty(len(pieces), len(self._parts.head.weight))
        made[known] = self._run([pieces[index] for index in known], [tables[index] for index in known])
        made[others] = self._plain.run([pieces[index] for index in others])
        return made

    def own_copy(self, layers: Sequence[str], update: MakeUpdate) -> UpdateTable | None:
        """Return an adapter's table; see :class:`lorakeet.serve.engine.forward.Forward`."""
        return made_table(len(self._parts.layers.layers), layers, update)

    def get_ready(self, adapter: Resident) -> None:
        """Make the table of an adapter in the model."""
        self._table(adapter)

    @torch.inference_mode()
    def _run(self, pieces: Sequence[Piece], tables: Sequence[UpdateTable | None]) -> Tensor:
        """Compute pieces, each with its adapter's table."""
        order = sorted(range(len(pieces)), key=lambda index: id(tables[index]))  # rows of an adapter stand together
        flat = [(owner, at) for owner in order for at in range(len(pieces[owner].ids))]
        rows = Rows(
            [piece.sequence.pages for piece in pieces],
            [owner for owner, _ in flat],
            [pieces[owner].sequence.length + at for owner, at in flat],
            [tables[owner] for owner, _ in flat],
        )
        x = self._parts.embedding(torch.tensor([pieces[owner].ids[at] for owner, at in flat], dtype=torch.long))
        cosine, sine = self._parts.angles(rows.positions)
        h = self._parts.layers.run(x, rows, self._pool.keys, self._pool.values, cosine, sine)
        last = {owner: row for row, (owner, _) in enumerate(flat)}
        return self._parts.logits(h[[last[owner] for owner in range(len(pieces))]])

    def _table(self, resident: Resident | None) -> UpdateTable | None:
        """Return the table of an adapter, an empty one for the base; None if the loops cannot compute the adapter."""
        if resident is None:
            return self._parts.no_updates
        if resident.copy is not None:
            table: UpdateTable = resident.copy
            return table
        if resident not in self.tables:
            self.tables[resident] = read_updates(self._model, resident.slot)
        return self.tables[resident]


def compiled_forward(model: Any, pages: Pages, agreement: Agreement | None = None) -> Forward:
    """Return the compiled pass of a model if there is one and it agrees with the model's own forward, else the plain pass.

    Args:
        model: A causal model, with or without adapters.
        pages: Pool of its keys and values.
        agreement: Record of an earlier comparison; None: both passes are compared.
    """
    try:
        made = CompiledForward(model, pages)
    except UnsupportedError:
        return PlainForward(model, pages)
    made.agreement = agreement
    if agreement is not None and agreement.is_noted:
        return made
    agrees = Verifier().agrees("model", model, lambda: _agrees(model, pages))
    return made if agrees else PlainForward(model, pages)


@torch.inference_mode()
def _agrees(model: Any, pages: Pages) -> bool:
    """Whether both passes agree on random tokens, which come in two pieces."""
    layers, _, heads, size, dim = pages.keys.shape
    own = Pages(layers, _TRIED // size + 1, heads, size, dim)
    ids = torch.randint(embedding_rows(model) or 1, (_TRIED + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    text = Tokens(pages=own.take(len(own)))
    compiled = CompiledForward(model, own)
    compiled.run([Piece(text, ids[:_TRIED])])
    text.length = _TRIED
    found = compiled.run([Piece(text, ids[_TRIED:])])
    with evaluating(model), acting(model, [None]):
        wanted = model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[:, -1]
    return is_close(wanted, found, _NEAR)
