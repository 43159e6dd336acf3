"""LoftQ: the adapter begins as the best approximation of what quantization loses of the weight.

Li et al. 2023 (arXiv:2310.08659), equation 6 and algorithm 1, for t = 1 … T, from A₀ = B₀ = 0:

    Q_t = q(W − s·B_{t−1}·A_{t−1})        s·B_t·A_t = SVD_r(W − Q_t)

The base's weight is Q_T, so the model begins at Q_T + s·B·A ≈ W. A base that is quantized already keeps its Q = q(W), and
one step gives the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.config import QUANTIZED_FORMATS
from lorakeet.errors import AdapterError, ConfigError
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.pissa import principal_pair
from lorakeet.lora.initialization.taken_part import one_thread, out_in, set_weight
from lorakeet.quant.hf_quantizer import FORMATS
from lorakeet.quant.protocol import dense_weight, is_rounded


def linear_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Return the linear layers that have the adapter, by name."""
    found: dict[str, Any] = dict(model.named_modules())
    return {name: layer for name, layer in found.items() if hasattr(layer, "fan_in_fan_out") and adapter in layer.r}


@torch.no_grad()
def start_from_quantized(model: nn.Module, adapter: str, config: PeftConfig, fresh: bool) -> None:
    """Quantize the adapted layers of a plain base, and initialize the adapter with what that loses (``loftq``).

    Their values become those of a quantized weight; their number format stays.

    Args:
        model: A model with the adapter.
        adapter: The adapter.
        config: Its settings.
        fresh: Whether the adapter is a new one.

    Raises:
        ConfigError: No format has these bits, or there is no iteration.
    """
    if config.init_lora_weights != "loftq":
        return
    bits, steps = config.loftq_config["loftq_bits"], config.loftq_config["loftq_iter"]
    if bits not in QUANTIZED_FORMATS or steps < 1:
        known = " or ".join(map(str, QUANTIZED_FORMATS))
        raise ConfigError(f"loftq_config has {bits} bits and {steps} iterations, expected {known} bits and at least 1")
    layers = linear_layers(model, adapter).values()
    if fresh and any(is_rounded(layer.base_layer) and not layer.base_layer.weight.is_meta for layer in layers):
        warn("the base is quantized already: replace_lora_weights_loftq(model) reads its full weights for LoftQ")
    for layer in layers:
        if is_rounded(layer.base_layer) or layer.base_layer.weight.is_meta:
            continue
        with one_thread():
            weight = out_in(layer, dense_weight(layer.base_layer, torch.float32)).contiguous()
            rest = weight
            for _ in range(steps):
                rounded = FORMATS[QUANTIZED_FORMATS[bits]].quantize(rest, False).dequantize()
                pair = principal_pair(weight - rounded, layer.r[adapter], layer.scaling[adapter])
                rest = weight - layer.scaling[adapter] * pair[1] @ pair[0]
            set_weight(layer, rounded)
        _set_pair(layer, adapter, pair)


@torch.no_grad()
def start_from_loss(
    model: nn.Module,
    adapter: str,
    read: Callable[[str], Tensor],
    keep: Callable[[str], bool] | None = None,
) -> int:
    """Initialize the adapter on the quantized layers of a base with what they lost of their full weights.

    Args:
        model: A model with the adapter.
        adapter: The adapter.
        read: Function that returns the full weight of a layer, by its name.
        keep: Function that says, after each layer, whether its new A and B stay; left out: all do.

    Returns:
        The number of layers whose A and B were replaced.

    Raises:
        AdapterError: No adapted layer is quantized.
    """
    layers = {n: layer for n, layer in linear_layers(model, adapter).items() if is_rounded(layer.base_layer)}
    if not layers:
        raise AdapterError(
            "no adapted layer of this base is quantized, so LoftQ has nothing to make up for", "load it with bits=8"
        )
    replaced = 0
    for name, layer in layers.items():
        base = layer.base_layer
        full = read(name).to(base.weight.device, torch.float32)
        with one_thread():
            lost = (full.T if base.transposed else full) - dense_weight(base, torch.float32)
            pair = principal_pair(lost, layer.r[adapter], layer.scaling[adapter])
        before = [part.weight.detach().clone() for part in layer.pair(adapter)]
        _set_pair(layer, adapter, pair)
        if keep is not None and not keep(name):
            _set_pair(layer, adapter, before)
            continue
        replaced += 1
    return replaced


def _set_pair(layer: Any, adapter: str, pair: Any) -> None:
    for part, value in zip(layer.pair(adapter), pair, strict=True):
        part.weight.copy_(value)
