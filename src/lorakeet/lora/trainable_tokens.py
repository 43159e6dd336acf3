"""Trained rows of an embedding (``trainable_token_indices``), and layers that share an adapted embedding's weight.

A few new or repurposed tokens need no low-rank update of a whole vocabulary. Their rows [n, dim] are all that is trained and
saved. Other layers may share the embedding's weight: a tied head, the embeddings of encoder and decoder. A :class:`TiedLayer`
in their place computes with the very same parameters, so each parameter has one gradient. A merge gives all of them one new
weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakeet.lora.embedding import LoraEmbedding, scale_rows, vocabulary_probe
from lorakeet.lora.layer import ActiveAdapters, LoraLayer
from lorakeet.quant.protocol import dense_weight, weight_rows

#: Name of the trained rows in the adapter's file, relative to the layer; PEFT's.
FILE_NAME = "token_adapter.trainable_tokens_delta"


class TrainableTokens(LoraLayer):
    """An embedding or head (weight [vocabulary, dim]) some of whose rows are replaced by trained ones."""

    shown_as = "TrainableTokensLayer"
    adapter_layer_names = ("trainable_tokens_delta",)

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        self.trainable_tokens_delta = nn.ParameterDict()  # PEFT's name; the rows themselves, no difference

    def add_tokens(self, adapter: str, tokens: Sequence[int]) -> None:
        """Let the adapter train the rows of ``tokens``, starting from the base's."""
        weight: Tensor = self.base_layer.weight
        # not persistent: the settings hold the tokens
        self.register_buffer(_tokens_name(adapter), torch.tensor(tokens, device=weight.device), persistent=False)
        rows = weight_rows(self.base_layer, self.tokens(adapter)).to(self._adapter_dtype())
        self.trainable_tokens_delta[adapter] = nn.Parameter(rows)
        self.r[adapter], self.lora_alpha[adapter] = len(tokens), float(len(tokens))
        self.scaling[adapter], self.lora_dropout[adapter] = 1.0, nn.Identity()

    def is_target(self) -> bool:
        return False

    @property
    def token_adapter(self) -> TrainableTokens:
        """The layer itself; PEFT's path to the rows goes through this name."""
        return self

    def tokens(self, adapter: str) -> Tensor:
        """Return the ids of the adapter's rows, in the order of its parameter: [n]."""
        return self.get_buffer(_tokens_name(adapter))

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        if adapter in self.trainable_tokens_delta:
            del self.trainable_tokens_delta[adapter]
            delattr(self, _tokens_name(adapter))

    def update(self, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        is_embedding = isinstance(self.base_layer, nn.Embedding)
        return (self.update_lookup if is_embedding else self.update_logits)(adapter, x, h, self.base_layer)

    def update_lookup(self, adapter: str, ids: Tensor, h: Tensor, base: nn.Module) -> Tensor:
        """Replace the rows of trained tokens in an embedding's output.

        Args:
            adapter: The adapter's name.
            ids: [...]
            h: The output of ``base``, [..., dim].
            base: An embedding that shares the adapted weight.
        """
        tokens, order = self.tokens(adapter).sort()
        nearest = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        rows = F.embedding(order[nearest], self.trainable_tokens_delta[adapter]).to(h.dtype)
        return torch.where((tokens[nearest] == ids)[..., None], scale_rows(rows, base), h)

    def update_logits(self, adapter: str, x: Tensor, h: Tensor, base: nn.Module) -> Tensor:
        """Replace the logits of trained tokens in a head's output.

        Args:
            adapter: The adapter's name.
            x: [..., dim]
            h: The output of ``base``, [..., vocabulary].
            base: A head that shares the adapted weight.
        """
        rows, tokens = self.trainable_tokens_delta[adapter], self.tokens(adapter)
        bias: Any = base.bias
        logits = F.linear(x.to(rows.dtype), rows, None if bias is None else bias[tokens].to(rows.dtype))
        return h.index_copy(-1, tokens, logits.to(h.dtype))

    def parts(self, adapter: str) -> list[Tensor]:
        return [self.trainable_tokens_delta[adapter]]

    def tensor_names(self, adapter: str) -> dict[str, str]:
        return {FILE_NAME: f"trainable_tokens_delta.{adapter}"}

    def delta(self, adapter: str) -> Tensor:
        weight = self.merged_weight([adapter])
        return weight - dense_weight(self.base_layer, weight.dtype)

    def merged_weight(self, adapters: list[str]) -> Tensor:
        weight = dense_weight(self.base_layer, self._adapter_dtype())
        for adapter in adapters:
            weight = weight.index_copy(0, self.tokens(adapter), self.trainable_tokens_delta[adapter].to(weight.dtype))
        return weight

    def conflict(self, adapters: Sequence[str]) -> str | None:
        seen: set[int] = set()
        for adapter in dict.fromkeys(adapters):
            mine = set(self.tokens(adapter).tolist()) if adapter in self.r else set()
            if shared := seen & mine:
                return f"each has its own row for token {min(shared)}"
            seen |= mine
        return None

    def probe(self) -> Tensor:
        return vocabulary_probe(self.base_layer)


class TiedLayer(LoraLayer):
    """A layer that shares its weight with an adapted embedding, and so its update.

    Its adapters have no parameters of their own. It computes with those of ``source``, as an embedding or, transposed, as a
    head.
    """

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters, source: LoraEmbedding | TrainableTokens) -> None:
        super().__init__(base_layer, switch)
        self._source = (source,)  # in a tuple, so that it is no child: its parameters belong to the source alone

    @property
    def source(self) -> LoraEmbedding | TrainableTokens:
        """The adapted embedding."""
        return self._source[0]

    def is_target(self) -> bool:
        return False

    def follow(self, adapter: str) -> None:
        """Let the source's adapter act here too."""
        for name in ("r", "lora_alpha", "scaling", "lora_dropout"):
            getattr(self, name)[adapter] = getattr(self.source, name)[adapter]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the source's parameters too: gradient checkpointing of this layer alone needs all that it depends on."""
        yield from super().parameters(recurse)
        for adapter in self.r:
            yield from self.source.parts(adapter)  # type: ignore[misc]

    def update(self, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        source, is_embedding = self.source, isinstance(self.base_layer, nn.Embedding)
        return (source.update_lookup if is_embedding else source.update_logits)(adapter, x, h, self.base_layer)

    def parts(self, adapter: str) -> list[Tensor]:
        return []

    def tensor_names(self, adapter: str) -> dict[str, str]:
        return {}

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
        for name in self.source.originals:  # the weight, or the tensors of a quantized one: still one weight
            self.originals[name] = getattr(self.base_layer, name)
            setattr(self.base_layer, name, getattr(self.source.base_layer, name))
        self.merged_adapters = mine

    def merged_weight(self, adapters: list[str]) -> Tensor:
        if isinstance(self.source, TrainableTokens):
            return TrainableTokens.merged_weight(self.source, adapters)
        weight = dense_weight(self.base_layer, self.delta(adapters[0]).dtype)
        for adapter in adapters:
            weight = weight + self.delta(adapter)
        return weight

    def probe(self) -> Tensor:
        return vocabulary_probe(self.base_layer)


def _tokens_name(adapter: str) -> str:
    return f"tokens_of_{adapter}"
