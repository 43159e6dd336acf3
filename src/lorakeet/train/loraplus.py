"""LoRA+: a higher learning rate for B than for A (Hayou et al. 2024, arXiv:2402.12354).

    A ← A - η·g_A,   B ← B - λη·g_B,   λ > 1

With one learning rate, A and B of a wide layer cannot both change its features efficiently. B starts at zero, and a
higher rate for B solves this. The groups are those of PEFT's ``create_loraplus_optimizer``. Vectors (biases, norms) have the
rate λη too, A and B of embeddings a small rate of their own, all others η.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lorakeet.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class LoraPlus:
    """Learning rates of LoRA+.

    Attributes:
        ratio: λ above.
        lr_embedding: Peak learning rate of A and B of embeddings.

    Raises:
        ConfigError: The ratio is below 1.
    """

    ratio: float
    lr_embedding: float = 1e-6  # as in the authors' and PEFT's code

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise ConfigError(
                f"LoRA+ got the ratio {self.ratio:g}, expected at least 1", "1 is plain LoRA, 16 is usual"
            )

    def rates(self, rate: float) -> tuple[float, float, float]:
        """Return the peak rates of A and all others, of A and B of embeddings, and of B and vectors."""
        return rate, self.lr_embedding, self.ratio * rate

    def split_(self, optimizer: Optimizer, model: nn.Module, rate: float) -> None:
        """Split each parameter group of a fresh ``optimizer`` by learning rate; other settings such as weight decay stay.

        Schedulers scale all groups alike. The first group has the rate η, if any parameter has it.

        Args:
            optimizer: Optimizer of parameters of ``model``, before its first step and before any scheduler.
            model: The model, for the names of the parameters.
            rate: η above.

        Raises:
            TrainingError: No B is trainable.
        """
        names = {parameter: name for name, parameter in model.named_parameters()}
        if not any("lora_B" in names.get(p, "") for group in optimizer.param_groups for p in group["params"]):
            raise TrainingError(
                f"LoRA+ (ratio {self.ratio:g}) needs a trainable lora_B, and the model has none",
                "train an adapter on linear layers, or leave loraplus_ratio out",
            )
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            parts: tuple[list[Tensor], ...] = ([], [], [])
            for parameter in group["params"]:
                parts[_part(names.get(parameter, ""), parameter)].append(parameter)
            groups += [
                {**group, "params": part, "lr": own} for part, own in zip(parts, self.rates(rate), strict=True) if part
            ]
        optimizer.param_groups[:] = groups


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Build an optimizer with the learning rates of LoRA+, as PEFT's function of this name does.

    Args:
        model: A model with an adapter.
        optimizer_cls: Class of the optimizer.
        lr: η above.
        loraplus_lr_ratio: λ above.
        **kwargs: Arguments of the optimizer; ``loraplus_lr_embedding`` (1e-6) and ``loraplus_weight_decay`` (0), which biases
            and norms do not get.

    Raises:
        ConfigError: The ratio is below 1.
        TrainingError: No B is trainable.
    """
    plus = LoraPlus(loraplus_lr_ratio, kwargs.pop("loraplus_lr_embedding", 1e-6))
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    norms = {p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    bare = [p for p, name in trained.items() if p in norms or "bias" in name]
    decayed = [p for p in trained if p not in set(bare)]
    groups = [{"params": part, "weight_decay": own} for part, own in ((decayed, decay), (bare, 0.0)) if part]
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    plus.split_(optimizer, model, lr)
    return optimizer


def _part(name: str, parameter: Tensor) -> int:
    """Return the index into :meth:`LoraPlus.rates` of a parameter's rate."""
    if "lora_embedding_" in name:
        return 1
    return 2 if "lora_B" in name or parameter.ndim == 1 else 0
