"""Dense reference of a tiny model with adapters: its answers and training steps, by formula and without Lorakeet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Token ids that both models answer.
IDS = torch.tensor([[0, 3, 6], [1, 1, 5]])
#: Learning rate of a step.
RATE = 0.005


class TinyModel(nn.Module):
    """An embedding and two linear layers, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin1, self.lin2 = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)
        self.double().eval()

    def forward(self, ids: Tensor) -> Tensor:
        h: Tensor = self.lin2(torch.tanh(self.lin1(self.emb(ids))))
        return h


@dataclass
class Adapter:
    """An adapter as it should be.

    Attributes:
        settings: Keyword arguments of its ``LoraConfig``.
        tensors: Its A and B, and its copies of whole modules, by name.
        biases: The base's biases that it trained; empty if it trains none.
        trains: Whether it is trainable.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    trains: bool = False

    def copy(self) -> Adapter:
        """Return a copy that shares no tensor."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        biases = {name: tensor.clone() for name, tensor in self.biases.items()}
        return Adapter(dict(self.settings), tensors, biases, self.trains)

    def delta(self, layer: str) -> Tensor | None:
        """Return s·B·A in the layout of the layer's weight; None if the layer is not adapted."""
        if layer not in self.settings["target_modules"]:
            return None
        r, alpha = self.settings["r"], self.settings["lora_alpha"]
        scale = alpha / (math.sqrt(r) if self.settings.get("use_rslora") else r)
        ba = scale * self.tensors[f"{layer}.B"] @ self.tensors[f"{layer}.A"]
        return ba.T if layer == "emb" else ba


def answer(base: dict[str, Tensor], adapters: list[Adapter]) -> Tensor:
    """Compute the output of the base with these adapters on it."""
    weights = dict(base)
    for adapter in adapters:
        weights |= adapter.biases
        for name in adapter.settings.get("modules_to_save") or ():
            weights |= {f"{name}.{leaf}": adapter.tensors[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
    for adapter in adapters:
        for layer in ("emb", "lin1", "lin2"):
            delta = adapter.delta(layer)
            if delta is not None:
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + delta
    h = torch.tanh(weights["emb.weight"][IDS] @ weights["lin1.weight"].T + weights["lin1.bias"])
    return h @ weights["lin2.weight"].T + weights["lin2.bias"]


def train_step(base: dict[str, Tensor], adapters: list[Adapter]) -> None:
    """Take one step of gradient descent on the sum of squares, with those adapters that are trainable."""
    learning = [t for a in adapters if a.trains for t in (*a.tensors.values(), *a.biases.values())]
    for tensor in learning:
        tensor.requires_grad_(True)
    loss = answer(base, adapters).square().sum()
    gradients = torch.autograd.grad(loss, learning, allow_unused=True)
    for tensor, gradient in zip(learning, gradients, strict=True):
        tensor.requires_grad_(False)
        if gradient is not None:
            tensor -= RATE * gradient
