"""BD-LoRA: A or B is block-diagonal, so that each device of a server that splits a layer needs its own block alone.

    ΔW = s·B·A,   B = diag(B₁, …, Bₙ) or A = diag(A₁, …, Aₙ)

A layer whose inputs are split has a block-diagonal A, one whose outputs are split a block-diagonal B. Only the blocks are
stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakeet.errors import ConfigError
from lorakeet.lora.variants.variant import AdaptedLayer, Variant


@dataclass
class BdLoraConfig:
    """Settings of BD-LoRA, with PEFT's names.

    Attributes:
        target_modules_bd_a: Parts of the names of layers whose A is block-diagonal.
        target_modules_bd_b: Parts of the names of layers whose B is block-diagonal.
        nblocks: Number of blocks.
        match_strict: Whether each adapted layer must be in one of the two lists.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.nblocks, int) or self.nblocks < 1:
            raise ConfigError(f"use_bdlora has nblocks={self.nblocks!r}, expected a positive integer")

    def matrix(self, leaf: str) -> str | None:
        """Return which matrix of a layer is block-diagonal, ``A`` or ``B``, by the last part of its name.

        Raises:
            ConfigError: Both are, or none although each must have one.
        """
        found = [
            matrix
            for matrix, parts in (("A", self.target_modules_bd_a), ("B", self.target_modules_bd_b))
            if any(part in leaf for part in parts or ())
        ]
        if len(found) == 2:
            raise ConfigError(f"use_bdlora: target {leaf} matches both A and B block-diagonal patterns, expected one")
        if not found and self.match_strict:
            raise ConfigError(
                f"use_bdlora: target {leaf} matches neither A nor B block-diagonal patterns, expected one of them",
                "match_strict=False makes the layer plain LoRA",
            )
        return found[0] if found else None


class BlockDiagonal(nn.Module):
    """Linear layer with a block-diagonal weight, of which the blocks alone are stored: [out, in / blocks].

    Raises:
        ConfigError: ``in_features`` or ``out_features`` is not a multiple of ``blocks``.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int, like: Tensor) -> None:
        super().__init__()
        if in_features % blocks or out_features % blocks:
            raise ConfigError(
                f"use_bdlora has nblocks={blocks}, but a matrix is [{out_features}, {in_features}], which is "
                "not divisible by it",
                "choose a number of blocks that divides the rank and the layer's features",
            )
        self.blocks = blocks
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features // blocks, dtype=like.dtype, device=like.device)
        )
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Compute each block's product: x [..., in] -> [..., out]."""
        weight = self.weight.unflatten(0, (self.blocks, -1))  # [blocks, out / blocks, in / blocks]
        return torch.einsum("...bi,boi->...bo", x.unflatten(-1, (self.blocks, -1)), weight).flatten(-2)

    def dense(self) -> Tensor:
        """Return the whole weight [out, in]."""
        return block_diagonal(self.weight, self.blocks)


def block_diagonal(weight: Tensor, blocks: int) -> Tensor:
    """Return the matrix [out, in] whose diagonal blocks are stored as [out, in / blocks]."""
    return torch.block_diag(*weight.chunk(blocks))


class BdLora(Variant):
    """LoRA with a block-diagonal A or B (``use_bdlora``)."""

    name = "BD-LoRA"
    settings: ClassVar[Mapping[str, Any]] = {"use_bdlora": None}
    types: ClassVar[Mapping[str, type]] = {"use_bdlora": BdLoraConfig}
    additive = False
    refused_by: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("vLLM", "llama.cpp", "Ollama"), "its block-diagonal matrices are stored in another shape"
    )

    def unsupported(self, target: nn.Module | nn.Parameter) -> str | None:
        return super().unsupported(target) or self.not_linear(target)

    def init(self, layer: AdaptedLayer, adapter: str, settings: Any) -> None:
        super().init(layer, adapter, settings)
        chosen: BdLoraConfig = settings.use_bdlora
        matrix, (a, b) = chosen.matrix(layer.leaf), layer.pair(adapter)
        if matrix == "A":
            a = BlockDiagonal(a.in_features, a.out_features, chosen.nblocks, a.weight)
            nn.init.kaiming_uniform_(a.weight)
        elif matrix == "B":
            random = settings.init_lora_weights is False
            b = BlockDiagonal(b.in_features, b.out_features, chosen.nblocks, b.weight)
            (nn.init.kaiming_uniform_ if random else nn.init.zeros_)(b.weight)
        layer.set_pair(adapter, a, b)

    def update(self, layer: AdaptedLayer, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        return (h + layer.low_rank(adapter, layer.dropped(adapter, x))).to(h.dtype)

    def merged_weight(self, layer: AdaptedLayer, adapter: str, weight: Tensor) -> Tensor:
        return weight + layer.delta(adapter)

    def saved_pair(self, leaf: str, tensors: Mapping[str, Tensor], settings: Any) -> tuple[Tensor, Tensor]:
        a, b = super().saved_pair(leaf, tensors, settings)
        chosen: BdLoraConfig = settings.use_bdlora
        matrix = chosen.matrix(leaf)
        dense_a = block_diagonal(a, chosen.nblocks) if matrix == "A" else a
        return dense_a, block_diagonal(b, chosen.nblocks) if matrix == "B" else b
