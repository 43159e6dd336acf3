"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354).

    A ← A - η·g_A,   B ← B - λη·g_B,   λ > 1

In a wide layer an A and a B that learn at one rate cannot both change its features much; a faster B, which starts at zero,
lets them. Who learns at which rate is as in PEFT's ``create_loraplus_optimizer``: vectors (biases, norms) at λη too, both
halves of an embedding's pair at a small rate of their own, everything else at η.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lorakeet.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class LoraPlus:
    """The learning rates of LoRA+.

    Attributes:
        ratio: λ above.
        lr_embedding: Peak learning rate of both halves of a pair on an embedding.

    Raises:
        ConfigError: a ratio below 1.
    """

    ratio: float
    lr_embedding: float = 1e-6  # as in the authors' and PEFT's code

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise ConfigError(
                f"LoRA+ got the ratio {self.ratio:g}, expected at least 1", "1 is plain LoRA, 16 is usual"
            )

    def rates(self, rate: float) -> tuple[float, float, float]:
        """Peak rates of A and all others, of embeddings' pairs, and of B and vectors."""
        return rate, self.lr_embedding, self.ratio * rate

    def split_(self, optimizer: Optimizer, model: nn.Module, rate: float) -> None:
        """Split each parameter group of a fresh ``optimizer`` by learning rate; its other settings, weight decay among
        them, stay. Schedulers scale all groups alike. The first group learns at η, where anything does.

        Args:
            optimizer: of parameters of ``model``, before its first step and before any scheduler.
            model: tells the parameters' names.
            rate: η above.

        Raises:
            TrainingError: no B learns, so there is nothing to speed up.
        """
        names = {parameter: name for name, parameter in model.named_parameters()}
        if not any("lora_B" in names.get(p, "") for group in optimizer.param_groups for p in group["params"]):
            raise TrainingError(
                f"LoRA+ with ratio {self.ratio:g} was asked for, but the model has no lora_B that learns",
                "train an adapter on linear layers, or leave loraplus_ratio out",
            )
        made: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            parts: tuple[list[Tensor], ...] = ([], [], [])
            for parameter in group["params"]:
                parts[_part(names.get(parameter, ""), parameter)].append(parameter)
            made += [
                {**group, "params": part, "lr": own} for part, own in zip(parts, self.rates(rate), strict=True) if part
            ]
        optimizer.param_groups[:] = made


def _part(name: str, parameter: Tensor) -> int:
    """Which of :meth:`LoraPlus.rates` a parameter learns at."""
    if "lora_embedding_" in name:
        return 1
    return 2 if "lora_B" in name or parameter.ndim == 1 else 0
