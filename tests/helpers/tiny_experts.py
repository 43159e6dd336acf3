"""Tiny random models with experts, adapters on their stacked weights, and the same update added as dense weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from helpers.tiny import shake, token_ids
from helpers.tiny_architectures import build
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.lora.target_parameters import LoraParameter

EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "target_parameters": ["gate_up_proj", "mlp.experts.down_proj"],
    "r": 3,
}
IDS = token_ids(3, 11)


def moe(kind: str = "mixtral", **more: Any) -> tf.PreTrainedModel:
    """Build a tiny random model with experts."""
    return build(tf.AutoModelForCausalLM, kind, **more)


def adapted(kind: str = "mixtral", **settings: Any) -> PeftModel:
    """Put an adapter with trained weights on the projections and experts of a tiny model."""
    model = get_peft_model(moe(kind), LoraConfig(**(EXPERTS | {"lora_alpha": 5} | settings)))
    shake(model)
    return model.eval()


def dense_twin(model: PeftModel, base: Any) -> Any:
    """Add every ΔW to ``base``, computed expert by expert from A and B alone."""
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, LoraParameter):
                owner, _, parameter = name.replace(".lora_parameters", "").rpartition(".")
                weight = base.get_submodule(owner).get_parameter(parameter)
                for adapter in set(model.active_adapters) & set(layer.r):
                    a, b = (half[adapter].weight for half in (layer.lora_A, layer.lora_B))
                    experts, r = weight.shape[0], layer.r[adapter]
                    for e in range(experts):
                        update = b[:, e::experts] @ a[e * r : (e + 1) * r]  # [out, in]
                        weight[e] += layer.scaling[adapter] * (update if weight[e].shape == update.shape else update.T)
            elif name.endswith("q_proj"):
                base.get_submodule(name).weight += layer.delta(model.active_adapters[0])
    return base
