"""Freezing of every A, so that B alone is trained (LoRA-FA, arXiv:2308.03303)."""

from __future__ import annotations

from torch import nn

from lorakeet.errors import TrainingError
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.linear import LoraPair


def freeze_lora_a(model: nn.Module) -> list[tuple[LoraPair, str]]:
    """Freeze A wherever B is trainable and ΔW = s·B·A: not of embeddings, whose A begins with zeros, nor of grouped layers.

    Returns:
        The layers, and the adapters that are trained there.

    Raises:
        TrainingError: No B is trainable, or an adapter has more than A and B.
    """
    pairs = []
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for adapter, variant in layer.variants.items():
            if not (variant.additive and variant.fused) or variant.parameters:
                raise TrainingError(f"LoRA-FA got a {variant.name} adapter, expected plain LoRA", "train it without")
            grouped = getattr(layer.base_layer, "groups", 1) > 1
            if isinstance(layer, LoraPair) and not grouped and layer.pair(adapter)[1].weight.requires_grad:
                pairs.append((layer, adapter))
    if not pairs:
        raise TrainingError(
            "LoRA-FA needs a trainable lora_B, and the model has none", "train an adapter on linear layers"
        )
    for layer, adapter in pairs:
        layer.pair(adapter)[0].weight.requires_grad_(False)
    return pairs
