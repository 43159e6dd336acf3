"""Choice of AdaLoRA's ranks: the importance of each triplet (Λᵢ, Pᵢ, Qᵢ), and the number of triplets that stay.

    I(w) = |w·∇w|,   Ī ← β₁·Ī + (1 − β₁)·I,   Ū ← β₂·Ū + (1 − β₂)·|I − Ī|     (arXiv:2303.10512, equations 8 to 10)

    s(w) = Ī·Ū,      S = s(Λᵢ) + mean s(Pᵢ) + mean s(Qᵢ)                      (equations 11 and 7)

    b(t) = b₀ until t_i; b_T + (b₀ − b_T)·(1 − (t − t_i)/(T − t_f − t_i))³; b_T from T − t_f on        (equation 12)

The b(t) most important triplets of the whole model stay. The singular values of all others are set to zero. The optimizer may
change these again, so a triplet can come back until T − t_f; from then on the choice is fixed. As in the authors' code, w is
the value after the optimizer's step and ∇w the gradient of that step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakeet.config import AdaLoraConfig


@dataclass
class Importance:
    """Importance of the triplets of one layer, as far as it is known.

    Attributes:
        config: Settings of the adapter.
        sensitivity: Ī of A, B and the singular values; empty before the first step and after the last choice.
        uncertainty: Ū of the same.
        kept: The last choice, [r]; None while the ranks may change.
    """

    config: AdaLoraConfig
    sensitivity: list[Tensor] = field(default_factory=list)
    uncertainty: list[Tensor] = field(default_factory=list)
    kept: Tensor | None = None

    def observe(self, parameters: Sequence[Tensor]) -> None:
        """Take the gradients of A, B and the singular values into the averages; without gradients these stay.

        Args:
            parameters: The three parameters.
        """
        if any(parameter.grad is None for parameter in parameters):
            return
        if not self.sensitivity:
            self.sensitivity = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
            self.uncertainty = [torch.zeros_like(each) for each in self.sensitivity]
        for parameter, smooth, apart in zip(parameters, self.sensitivity, self.uncertainty, strict=True):
            now = (parameter.float() * parameter.grad.float()).abs()  # type: ignore[union-attr]
            smooth.mul_(self.config.beta1).add_(now, alpha=1 - self.config.beta1)
            apart.mul_(self.config.beta2).add_((now - smooth).abs(), alpha=1 - self.config.beta2)

    def scores(self, r: int) -> Tensor:
        """Return S of each triplet, [r]; zeros before the first gradient."""
        if not self.sensitivity:
            return torch.zeros(r)
        a, b, values = (i * u for i, u in zip(self.sensitivity, self.uncertainty, strict=True))
        return (values.flatten() + a.mean(dim=1) + b.mean(dim=0)).cpu()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "kept": self.kept}

    def load(self, state: Mapping[str, Any], like: Tensor) -> None:
        """Take the state of a checkpoint, on the device of ``like``."""
        self.sensitivity = [each.to(like.device) for each in state["sensitivity"]]
        self.uncertainty = [each.to(like.device) for each in state["uncertainty"]]
        self.kept = state["kept"]


def budget(config: AdaLoraConfig, start: int, target: int, step: int, total: int) -> int:
    """Return b(t), the number of triplets that stay after a step.

    Args:
        config: Settings of the adapter.
        start: b₀.
        target: b_T.
        step: t, steps that are done.
        total: T, all steps.
    """
    if step <= config.tinit:
        return start
    if step >= total - config.tfinal:
        return target
    left = 1 - (step - config.tinit) / (total - config.tfinal - config.tinit)
    return int((start - target) * left**3 + target)


@torch.no_grad()
def allocate(layers: Sequence[Any], adapter: str, step: int, total: int) -> None:
    """Update the importance of the triplets, and set the singular values of the least important ones to zero.

    To be called after each step of the optimizer, before the gradients are cleared.

    Args:
        layers: The layers with the adapter, which is of AdaLoRA.
        adapter: Its name.
        step: t, steps that are done.
        total: T, all steps.
    """
    notes: list[Importance] = [layer.notes[adapter] for layer in layers]
    values = [layer.part("lora_E", adapter) for layer in layers]
    config, last = notes[0].config, total - notes[0].config.tfinal
    if step < last:
        for layer, note, own in zip(layers, notes, values, strict=True):
            a, b = layer.pair(adapter)
            note.observe((a.weight, b.weight, own))
    chooses = step == last or (config.tinit < step < last and step % config.deltaT == 0)
    if chooses:
        kept = _most_important(
            [note.scores(len(own)) for note, own in zip(notes, values, strict=True)], config, step, total
        )
        for note, own, mask in zip(notes, values, kept, strict=True):
            own.masked_fill_(~mask.to(own.device)[:, None], 0.0)
            if step == last:
                note.kept, note.sensitivity, note.uncertainty = mask, [], []
    elif step > last:
        for note, own in zip(notes, values, strict=True):
            if note.kept is not None:
                own.masked_fill_(~note.kept.to(own.device)[:, None], 0.0)


def _most_important(scores: Sequence[Tensor], config: AdaLoraConfig, step: int, total: int) -> Sequence[Tensor]:
    """Return for each layer which triplets stay, [r]: b(t) of all, those of the highest scores."""
    ranks, every = [len(each) for each in scores], torch.cat(list(scores))
    cut = len(every) - budget(config, len(every), config.target_r * len(scores), step, total)
    kept = torch.ones(len(every), dtype=torch.bool)
    kept[every.argsort(stable=True)[: max(cut, 0)]] = False
    return kept.split(ranks)
