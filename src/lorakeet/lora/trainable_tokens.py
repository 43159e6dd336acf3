"""Rows of an embedding that are trained themselves (``trainable_token_indices``), and layers that share its weight.

A few new or repurposed tokens need no low-rank update of a whole vocabulary: their rows, n of them, are all that learns and
all that is saved, [n, dim]. Where other layers share the embedding's weight (a tied head, the embeddings of encoder and
decoder), a :class:`TiedLayer` in their place computes with the very same parameters, so that each has one gradient, and a
merge gives all of them one new weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakeet.lora.layer import ActiveAdapters, LoraEmbedding, LoraLayer, scaled, vocabulary_probe
from lorakeet.quant.protocol import weight_rows


class TrainableTokens(LoraLayer):
    """An embedding (or head; weight [vocabulary, dim]) some of whose rows are replaced by ones that learn."""

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        self.trainable_tokens_delta = nn.ParameterDict()  # PEFT's name; the rows themselves, no difference

    def add_tokens(self, adapter: str, tokens: Sequence[int]) -> None:
        """Let the adapter train the rows of ``tokens``, starting from the base's."""
        weight: Tensor = self.base_layer.weight
        # no state: the settings say which tokens they are
        self.register_buffer(_indices(adapter), torch.tensor(tokens, device=weight.device), persistent=False)
        rows = weight_rows(self.base_layer, self.tokens(adapter)).to(self._adapter_dtype())
        self.trainable_tokens_delta[adapter] = nn.Parameter(rows)
        self.r[adapter], self.lora_alpha[adapter] = len(tokens), float(len(tokens))
        self.scaling[adapter], self.lora_dropout[adapter] = 1.0, 0.0

    def tokens(self, adapter: str) -> Tensor:
        """Which rows the adapter trains, in the order of its parameter: [n]."""
        return self.get_buffer(_indices(adapter))

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        if adapter in self.trainable_tokens_delta:
            del self.trainable_tokens_delta[adapter]
            delattr(self, _indices(adapter))

    def update(self, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        through = self.looked_up if isinstance(self.base_layer, nn.Embedding) else self.projected
        return through(adapter, x, h, self.base_layer)

    def looked_up(self, adapter: str, ids: Tensor, h: Tensor, base: nn.Module) -> Tensor:
        """``h``, what the embedding ``base`` has for ``ids``, with the rows of trained tokens in place of its own."""
        tokens, order = self.tokens(adapter).sort()
        near = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        rows = F.embedding(order[near], self.trainable_tokens_delta[adapter]).to(h.dtype)
        return torch.where((tokens[near] == ids)[..., None], scaled(rows, base), h)

    def projected(self, adapter: str, x: Tensor, h: Tensor, base: nn.Module) -> Tensor:
        """``h``, what the head ``base`` makes of ``x``, with the logits of trained tokens in place of its own."""
        rows, tokens = self.trainable_tokens_delta[adapter], self.tokens(adapter)
        bias: Any = base.bias
        logits = F.linear(x.to(rows.dtype), rows, None if bias is None else bias[tokens].to(rows.dtype))
        return h.index_copy(-1, tokens, logits.to(h.dtype))

    def parts(self, adapter: str) -> list[Tensor]:
        return [self.trainable_tokens_delta[adapter]]

    def delta(self, adapter: str) -> Tensor:
        return self.merged_weight([adapter]) - self.base_layer.weight

    def merged_weight(self, adapters: list[str]) -> Tensor:
        weight = self.base_layer.weight.to(self._adapter_dtype())
        for adapter in adapters:
            weight = weight.index_copy(0, self.tokens(adapter), self.trainable_tokens_delta[adapter].to(weight.dtype))
        return weight

    def conflict(self, adapters: Sequence[str]) -> str | None:
        seen: set[int] = set()
        for adapter in dict.fromkeys(adapters):
            mine = set(self.tokens(adapter).tolist()) if adapter in self.r else set()
            if both := seen & mine:
                return f"each has a row of its own for token {min(both)}"
            seen |= mine
        return None

    def probe(self) -> Tensor:
        return vocabulary_probe(self.base_layer)


class TiedLayer(LoraLayer):
    """A layer that shares its weight with an adapted embedding, and so its update: W₀ + ΔW of the embedding.

    Adapters have no parameters here; those of ``source`` answer, looked up (another embedding) or transposed (a head).
    """

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters, source: LoraEmbedding | TrainableTokens) -> None:
        super().__init__(base_layer, switch)
        self._source = (source,)  # no child: its parameters are the source's alone

    @property
    def source(self) -> LoraEmbedding | TrainableTokens:
        """The adapted embedding."""
        return self._source[0]

    def follow(self, adapter: str) -> None:
        """Let the source's adapter answer here too."""
        for name in ("r", "lora_alpha", "scaling", "lora_dropout"):
            getattr(self, name)[adapter] = getattr(self.source, name)[adapter]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Also the source's: whoever takes this layer's gradient on its own needs all that its answer depends on."""
        yield from super().parameters(recurse)
        for adapter in self.r:
            yield from self.source.parts(adapter)  # type: ignore[misc]

    def update(self, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        through = self.source.looked_up if isinstance(self.base_layer, nn.Embedding) else self.source.projected
        return through(adapter, x, h, self.base_layer)

    def parts(self, adapter: str) -> list[Tensor]:
        return []

    def delta(self, adapter: str) -> Tensor:
        return self.source.delta(adapter)

    def merge_(self, adapters: list[str]) -> None:
        mine = [adapter for adapter in adapters if adapter in self.r]
        if not mine or self.merged_adapters:
            return
        if set(mine) != {adapter for adapter in adapters if adapter in self.source.r}:
            super().merge_(adapters)  # one of them adapts the embedding alone
            return
        if not self.source.merged_adapters:
            self.source.merge_(adapters)
        self.originals["weight"] = self.base_layer.weight
        self.base_layer.weight = self.source.base_layer.weight  # still one weight
        self.merged_adapters = mine

    def merged_weight(self, adapters: list[str]) -> Tensor:
        if isinstance(self.source, TrainableTokens):
            return TrainableTokens.merged_weight(self.source, adapters)
        return super().merged_weight(adapters)

    def probe(self) -> Tensor:
        return vocabulary_probe(self.base_layer)


def _indices(adapter: str) -> str:
    return f"tokens_of_{adapter}"
