"""AdaLoRA in a training: the penalty in each step's gradient, the choice of ranks after it, and both in a checkpoint.

The penalty's gradient is added once a step, before clipping, whatever the number of micro-batches and processes. The loss in
the log is the model's own, so that it compares with other variants. The ranks are chosen from the gradients of the
whole step, which are equal in all processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.config.adalora import SCHEDULE_HINT
from lorakeet.errors import ConfigError
from lorakeet.lora.variants.adalora import adaptive_layers, orthogonality
from lorakeet.lora.variants.rank_allocator import allocate
from lorakeet.security.paths import is_file
from lorakeet.train.checkpoints.state_files import read_state, write_state
from lorakeet.train.guards.guarded_trainer import GuardedTrainer

#: Name of the files of a checkpoint with the importance of triplets.
STATE = "importance"


class RankTrainer(GuardedTrainer):
    """The part of the Trainer that lets the ranks of AdaLoRA adapters fall; without any it does nothing."""

    def __init__(self, *rest: Any, **settings: Any) -> None:
        super().__init__(*rest, **settings)
        self.add_callback(_RankCallback(self))

    def adaptive(self) -> dict[str, list[Any]]:
        """Return the layers of each AdaLoRA adapter that trains, by its name."""
        if not isinstance(self.model, PeftModel):
            return {}
        found = {name: adaptive_layers(self.model.lora_layers(), name) for name in self.model.peft_config}
        return {name: layers for name, layers in found.items() if layers and self.model.trains(name)}

    def begin_training(self) -> None:
        """Check that the ranks can fall in this many steps, then what every training needs.

        Raises:
            ConfigError: They cannot.
        """
        for name, layers in self.adaptive().items():
            if error := layers[0].notes[name].config.schedule_error(self.state.max_steps):
                raise ConfigError(error, SCHEDULE_HINT)
        super().begin_training()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run a pass, and with the last one of a step add the gradient of the penalty."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            scaler = getattr(self.accelerator, "scaler", None)
            for name, layers in self.adaptive().items():
                add_penalty_gradient(layers, name, scaler.get_scale() if scaler is not None else 1.0)
        return loss

    def choose_ranks(self, step: int) -> None:
        """Choose the ranks after an optimizer step; its gradients are still there.

        Args:
            step: Steps that are done.
        """
        for name, layers in self.adaptive().items():
            allocate(layers, name, step, layers[0].notes[name].config.total_step or self.state.max_steps)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and (found := self.adaptive()):
            state = {name: [layer.notes[name].state() for layer in layers] for name, layers in found.items()}
            write_state(Path(output_dir), STATE, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not is_file(Path(checkpoint) / f"{STATE}.json"):
            return
        saved = read_state(Path(checkpoint), STATE)
        for name, layers in self.adaptive().items():
            for layer, state in zip(layers, saved[name], strict=True):
                layer.notes[name].load(state, layer.pair(name)[0].weight)

    def _missing_parts(self, folder: Path) -> list[str]:
        lost = ["importance of ranks"] if self.adaptive() and not is_file(folder / f"{STATE}.json") else []
        return [*super()._missing_parts(folder), *lost]


class _RankCallback(TrainerCallback):
    """Caller of :meth:`RankTrainer.choose_ranks` between the step and the clearing of its gradients."""

    def __init__(self, trainer: RankTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.choose_ranks(state.global_step + 1)


def add_penalty_gradient(layers: list[Any], adapter: str, factor: float = 1.0) -> None:
    """Add the gradient of the penalty to those of A and B.

    It is not computed by ``backward``, whose hooks would wait for other processes.

    Args:
        layers: The layers with the adapter.
        adapter: Its name.
        factor: Scale of the gradients that are there, in fp16.
    """
    weights = [part.weight for layer in layers for part in layer.pair(adapter)]
    trained = [weight for weight in weights if weight.requires_grad and weight.grad is not None]
    penalty = orthogonality(layers, adapter)
    if not trained or not isinstance(penalty, Tensor):
        return
    for weight, gradient in zip(trained, torch.autograd.grad(penalty * factor, trained), strict=True):
        weight.grad += gradient.to(weight.grad.dtype)
