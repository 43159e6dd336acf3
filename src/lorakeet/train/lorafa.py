"""LoRA-FA: A stays as it begins, and B alone is trained (Zhang et al. 2023, arXiv:2308.03303).

    g' = (1/s²)·g_B·(A·Aᵀ)⁻¹        the step of B whose ΔW = s·g'·A is nearest to the gradient of the whole weight

Here g_B = s·G·Aᵀ is the gradient of B, and G that of W; g' minimizes ‖s·g'·A - G‖. The corrected gradient goes into the
optimizer in place of g_B, as in PEFT's ``create_lorafa_optimizer``. With A frozen, no input of a layer is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorakeet.lora.lifecycle.frozen_a import freeze_lora_a

#: Added to the diagonal of A·Aᵀ, so that an A of lower rank can be inverted; PEFT's value.
_RIDGE = 1e-8


class LoraFA:
    """A model whose A are frozen, and the correction of the gradients of B.

    Attributes:
        pairs: The layers and the adapters that are trained there.

    Raises:
        TrainingError: No B is trainable, or an adapter has more than A and B.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pairs = freeze_lora_a(model)

    def attach_(self, optimizer: Optimizer) -> None:
        """Let each step of ``optimizer`` begin with the correction of the gradients."""
        optimizer.register_step_pre_hook(self._correct)

    @torch.no_grad()
    def _correct(self, *_: Any) -> None:
        for layer, adapter in self.pairs:
            weight = layer.pair(adapter)[1].weight
            if weight.grad is not None:
                a, _b = layer.matrices(adapter)
                weight.grad = corrected_gradient(weight.grad, a, layer.scaling[adapter])


def corrected_gradient(gradient: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """Return g' above for g_B [out, r, ...] and A [r, in], in the gradient's dtype and shape."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    a = lora_A.to(dtype)
    gram = (a @ a.T).double()  # inverted in fp64, [r, r]; the products have the same bits with any number of threads
    inverse = torch.linalg.inv(gram + _RIDGE * torch.eye(len(a), dtype=gram.dtype, device=a.device)) / scaling**2
    return (gradient.flatten(1).to(dtype) @ inverse.to(dtype)).view_as(gradient).to(gradient.dtype)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """Freeze every A and build AdamW with the corrected gradients, as PEFT's function of this name does.

    Args:
        model: A model with an adapter.
        r: Accepted for code written for PEFT; the layers know their rank.
        lora_alpha: The same.
        lr: Learning rate.
        weight_decay: AdamW's.
        use_rslora: Accepted for code written for PEFT.

    Raises:
        TrainingError: No B is trainable, or an adapter has more than A and B.
    """
    method = LoraFA(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, eps=1e-6, weight_decay=weight_decay)
    method.attach_(optimizer)
    return optimizer
