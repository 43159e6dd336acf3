"""One adapter in Lorakeet and in peft, with the same values: everything that both compute is compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lorakeet import LoraConfig, get_peft_model

PREFIX = "base_model.model."


class Twins:
    """A model with an adapter in both packages.

    Attributes:
        ours: The model in Lorakeet.
        theirs: The model in peft.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        settings = {"init_lora_weights": False, **settings}
        torch.manual_seed(1)
        self.theirs: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
        self.ours: Any = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
        self._align()

    def add(self, name: str, settings: dict[str, Any]) -> None:
        """Add a further adapter to both."""
        settings = {"init_lora_weights": False, **settings}
        self.theirs.add_adapter(name, peft.LoraConfig(**settings))
        self.ours.add_adapter(name, LoraConfig(**settings))
        self._align()

    def _align(self) -> None:
        """Give the adapter of peft other values, as after training, and ours the same; the names must be the same too."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in self.theirs.named_parameters():
                if "magnitude" in name or "lora_diag" in name:
                    p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
        state = {key.removeprefix(PREFIX): value for key, value in self.theirs.state_dict().items()}
        assert state.keys() == self.ours.state_dict().keys()
        assert all(value.shape == state[key].shape for key, value in self.ours.state_dict().items())
        self.ours.load_state_dict(state)

    def activate(self, names: Sequence[str], ours_only: bool = False) -> None:
        """Activate adapters in both."""
        self.ours.set_adapter(list(names))
        if not ours_only:
            self.theirs.base_model.set_adapter(list(names))

    def assert_same_outputs(self, x: Tensor) -> None:
        """Compare the outputs."""
        torch.testing.assert_close(self.ours(x), self.theirs(x), rtol=0, atol=1e-5)

    def assert_same_gradients(self, x: Tensor) -> None:
        """Compare the gradients of a sum of squares, of every parameter and of a floating input."""
        inputs = []
        for model in (self.ours, self.theirs):
            own = x.clone().requires_grad_(x.is_floating_point())
            model.zero_grad()
            model(own).square().sum().backward()
            inputs.append(own.grad)
        theirs = {n.removeprefix(PREFIX): p.grad for n, p in self.theirs.named_parameters() if p.grad is not None}
        ours = {name: p.grad for name, p in self.ours.named_parameters() if p.grad is not None}
        assert ours.keys() == theirs.keys() and ours
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs[0], inputs[1], rtol=1e-4, atol=1e-5)

    def assert_same_merge(self, x: Tensor) -> None:
        """Merge both: the weights are the same and give the outputs of before; unmerging restores every bit."""
        self.ours.eval()
        before = {name: p.clone() for name, p in self.ours.named_parameters()}
        unmerged = self.ours(x)
        self.ours.merge_adapter()
        torch.testing.assert_close(self.ours(x), unmerged, rtol=0, atol=1e-5)
        merged = copy.deepcopy(self.theirs.eval()).merge_and_unload()
        kept = {name.replace(".base_layer", ""): p for name, p in self.ours.named_parameters() if ".lora_" not in name}
        for name, p in merged.named_parameters():
            torch.testing.assert_close(kept[name], p, rtol=1e-5, atol=1e-5)
        self.ours.unmerge_adapter()
        assert all(torch.equal(p, before[name]) for name, p in self.ours.named_parameters())
