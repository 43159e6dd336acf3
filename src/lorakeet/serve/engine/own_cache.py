"""Forward pass of models whose cache is no plain keys and values: row by row, each over its own cache of transformers.

These are models with sliding windows, with states instead of keys, or with heads of several sizes. Prompts run whole, and no
prefix is found again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.engine.forward import Piece, acting, forward_arguments
from lorakeet.serve.engine.residents import MakeUpdate, Resident


class OwnCacheForward:
    """The model's own loop of generation, a step at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.pages: Pages | None = None
        self._arguments = forward_arguments(model)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute each piece by itself; see :class:`lorakeet.serve.engine.forward.Forward`."""
        rows = []
        for piece in pieces:
            with acting(self.model, [piece.sequence.adapter]):
                rows.append(self._run_one(piece))
        return torch.stack(rows)

    def own_copy(self, layers: Sequence[str], update: MakeUpdate) -> None:
        """Return None: the model computes all adapters."""

    def get_ready(self, adapter: Resident) -> None:
        """Keep things as they are: the model has the adapter."""

    def _run_one(self, piece: Piece) -> Tensor:
        model, sequence = self.model, piece.sequence
        device = next(model.parameters()).device
        new = torch.tensor([piece.ids], device=device)
        if sequence.state is None:
            sequence.state = {"attention_mask": torch.ones_like(new), "use_cache": True, **self._cache()}
        start, end = sequence.length, sequence.length + len(piece.ids)
        places = {"position_ids": torch.arange(start, end, device=device)[None]}
        given = model.prepare_inputs_for_generation(
            new,
            next_sequence_length=len(piece.ids),
            is_first_iteration=start == 0,
            **(places if "position_ids" in self._arguments else {}),
            **sequence.state,
        )
        output = model(**given, return_dict=True)
        sequence.state = model._update_model_kwargs_for_generation(output, sequence.state)
        row: Tensor = output.logits[0, -1].float()
        return row

    def _cache(self) -> dict[str, Any]:
        """Return an empty cache under the name that the model gives it; nothing for a model that makes its own."""
        if not self.model._supports_default_dynamic_cache():
            return {}
        name = next(name for name in ("past_key_values", "cache_params") if name in self._arguments)
        return {name: DynamicCache(config=self.model.config.get_text_config(decoder=True))}
