"""LoRA on an embedding: h = W₀[x] + s·(B·A[:, x])ᵀ, where x are ids.

The input is one-hot, so A·x is a column of A [r, vocabulary]; B is [dim, r]. A starts at zero and B normal, as in PEFT.
A head that shares the embedding's weight multiplies by the same update, transposed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.mica import MICA, initialize_minor
from lorakeet.lora.layer import ActiveAdapters, LoraLayer, noise
from lorakeet.quant.protocol import dense_weight, weight_shape


class LoraEmbedding(LoraLayer):
    """LoRA on ``nn.Embedding`` (weight [vocabulary, dim])."""

    shown_as = "lora.Embedding"
    channel_dim = 1

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # empty; PEFT has all four
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        vocabulary, dim = weight_shape(self.base_layer)
        self.lora_embedding_A[adapter] = nn.Parameter(torch.empty(r, vocabulary, **self._device_dtype()))
        self.lora_embedding_B[adapter] = nn.Parameter(torch.empty(dim, r, **self._device_dtype()))

    def initialize(self, adapter: str, how: bool | str) -> None:
        lora_A, lora_B = self.matrices(adapter)
        if how == MICA:
            initialize_minor(lora_A, lora_B, dense_weight(self.base_layer, lora_A.dtype).T)
            return
        nn.init.normal_(lora_B)
        if how is False:  # both random, as in the linear layers
            nn.init.normal_(lora_A)
        else:
            nn.init.zeros_(lora_A)

    def low_rank(self, adapter: str, dropped: Tensor) -> Tensor:
        return self.lookup_delta(adapter, dropped, self.base_layer)

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def lookup_delta(self, adapter: str, ids: Tensor, base: nn.Module) -> Tensor:
        """Return the update of the rows ``ids`` [...] of the embedding ``base``: [..., dim]."""
        columns = F.embedding(ids, self.lora_embedding_A[adapter].T)  # [..., r]
        update = columns @ self.lora_embedding_B[adapter].T * self.scaling[adapter]
        return scale_rows(update, base)

    def update_lookup(self, adapter: str, ids: Tensor, h: Tensor, base: nn.Module) -> Tensor:
        """Add the update to an embedding's output.

        Args:
            adapter: The adapter's name.
            ids: [...]
            h: The output of ``base``, [..., dim].
            base: An embedding that shares the adapted weight.
        """
        return (h + self.lookup_delta(adapter, ids, base)).to(h.dtype)

    def update_logits(self, adapter: str, x: Tensor, h: Tensor, base: nn.Module) -> Tensor:
        """Add the update of the weight, which a head shares with the embedding, to the head's output.

        Args:
            adapter: The adapter's name.
            x: [..., dim]
            h: The output of ``base``, [..., vocabulary].
            base: The head.
        """
        low_rank = x.to(self.lora_embedding_B[adapter].dtype) @ self.lora_embedding_B[adapter]  # [..., r]
        return (h + low_rank @ self.lora_embedding_A[adapter] * self.scaling[adapter]).to(h.dtype)

    def parts(self, adapter: str) -> list[Tensor]:
        own = [self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]]
        return own + self.variant_parts(adapter)

    def tensor_names(self, adapter: str) -> dict[str, str]:
        own = {name: f"{name}.{adapter}" for name in ("lora_embedding_A", "lora_embedding_B")}
        return own | self.variants[adapter].tensor_names(adapter)

    def delta(self, adapter: str) -> Tensor:
        return self.scaling[adapter] * (self.lora_embedding_B[adapter] @ self.lora_embedding_A[adapter]).T

    def probe(self) -> Tensor:
        return vocabulary_probe(self.base_layer)

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        for table in (self.lora_embedding_A, self.lora_embedding_B):
            if adapter in table:
                del table[adapter]


def scale_rows(rows: Tensor, embedding: nn.Module) -> Tensor:
    """Scale rows as ``embedding`` scales its output; only some embeddings do."""
    scale = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * scale


def vocabulary_probe(layer: nn.Module) -> Tensor:
    """Return a fixed pseudo-random input for an embedding (ids) or a head (vectors), of weight [vocabulary, dim]."""
    vocabulary, dim = weight_shape(layer)
    if isinstance(layer, nn.Embedding):
        ids = torch.randint(vocabulary, (32,), generator=torch.Generator().manual_seed(0))
        return ids.to(layer.weight.device)
    return noise((32, dim), layer)
