"""The share of an update that a merge loses, measured in the weights: ‖W' − W − ΔW‖ / ‖ΔW‖ in each layer.

A weight in half precision takes steps of its own last bit. A bf16 number has 8 significant bits, so a weight w moves in steps
of |w|/256 to |w|/128, and a smaller change is rounded away. Outputs do not show this: in half precision their own rounding is
as large as the effect of a small adapter. So each merge is measured in the weights, in fp32 (fp64 for a base in fp64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakeet.errors import MergeError
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.peft_names.words import BROKEN
from lorakeet.quant.protocol import dense_weight, is_quantized, is_rounded, weight_dtype

#: Share of an update. From here on the rounding error has more than a quarter of the update's energy (0.5²). A merge that
#: takes more is refused by the command and told loudly in memory (measured in docs/lab.md).
ACCEPTED_LOSS = 0.5
#: Share of the largest relative update ‖ΔW‖/‖W‖ of a model. A layer whose own is smaller adds nothing that can be seen to
#: the outputs, so what rounding takes of it does not count.
NEGLIGIBLE = 0.01

#: Function of a base's parameter: the number format that it will be stored in.
Store = Callable[[Tensor], torch.dtype]


@dataclass(frozen=True)
class LayerLoss:
    """The loss of one layer's merge, as norms (Frobenius) of its weight and bias.

    Attributes:
        name: The layer's name.
        error: ‖W' − W − ΔW‖, where W' is the stored weight.
        update: ‖ΔW‖
        weight: ‖W‖
    """

    name: str
    error: float
    update: float
    weight: float

    @property
    def share(self) -> float:
        """The share of the update that is lost: 0 is an exact merge, 1 a weight that did not change."""
        return self.error / self.update if self.update else 0.0

    @property
    def relative_update(self) -> float:
        """‖ΔW‖/‖W‖, a measure of the update's part in the layer's output."""
        return self.update / self.weight if self.weight else math.inf


@torch.no_grad()
def merge_layer(name: str, layer: LoraLayer, adapters: list[str], store: Store | None = None) -> LayerLoss | None:
    """Merge adapters into a layer, and measure the loss; None if the merge of a tied layer has done it already.

    Args:
        name: The layer's name.
        layer: The layer, unmerged.
        adapters: Names of the adapters.
        store: Number format that a parameter of the base will be stored in; None: its own.

    Raises:
        MergeError: The merged weight has NaN or infinite values.
    """
    if layer.merged_adapters:
        return None
    mine = [adapter for adapter in adapters if adapter in layer.r]
    before, updates = _weights(layer), layer.weight_updates(mine)
    bias, bias_updates = _bias(layer), [extra for adapter in mine if (extra := layer.bias_delta(adapter)) is not None]
    layer.merge_(mine)
    after = [weight.to(_stored(layer, "weight", store)) for weight in _weights(layer)]
    parts = [*zip(before, after, updates, strict=True)]
    if bias is not None and (changed := _bias(layer)) is not None and bias_updates:
        parts.append((bias, changed.to(_stored(layer, "bias", store)), torch.stack(bias_updates).sum(0)))
    error, update, weight = _sum_norms(parts)
    if not math.isfinite(error):
        broken = [adapter for adapter in mine if not all(part.isfinite().all() for part in layer.parts(adapter))]
        if broken:
            raise MergeError(BROKEN.format(adapter=", ".join(broken)))
        raise MergeError(
            f"the merged weight of {name} has NaN or infinite values",
            f"the range of {weight_dtype(layer.base_layer)} is too small for adapter {', '.join(mine)}: model.float() first",
        )
    return LayerLoss(name, error, update, weight)


def _weights(layer: LoraLayer) -> Sequence[Tensor]:
    """Return the base layer's weight in the slices of :meth:`LoraLayer.weight_updates`."""
    base = layer.base_layer
    return layer.weight_slices(dense_weight(base, torch.float32) if is_quantized(base) else base.weight.detach())


def _bias(layer: LoraLayer) -> Tensor | None:
    bias: Tensor | None = getattr(layer.base_layer, "bias", None)
    return None if bias is None else bias.detach()


def _sum_norms(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float, float]:
    error, update, weight = zip(*(_norms(*part) for part in parts), strict=True)
    return math.hypot(*error), math.hypot(*update), math.hypot(*weight)


def _norms(before: Tensor, after: Tensor, update: Tensor) -> tuple[float, float, float]:
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after, update = before.to(dtype), after.to(dtype), update.to(dtype)
    return float((after - before).sub_(update).norm()), float(update.norm()), float(before.norm())


def _stored(layer: LoraLayer, name: str, store: Store | None) -> torch.dtype:
    """Return the number format that a merged layer's weight or bias will be stored in."""
    if is_rounded(layer.base_layer) and name == "weight":
        return torch.float32  # measured in the values that its tensors stand for
    if is_quantized(layer.base_layer) and name == "weight" and store is None:
        return weight_dtype(layer.base_layer)
    own: Tensor = layer.originals.get(name, getattr(layer.base_layer, name))
    return own.dtype if store is None else store(own)


def round_merged(layers: Iterable[LoraLayer], store: Store) -> None:
    """Round merged weights and biases to the formats that they will be stored in; their own dtype stays."""
    for layer in layers:
        for name in layer.originals:
            parameter = getattr(layer.base_layer, name)
            if parameter.is_floating_point() and not is_rounded(layer.base_layer):
                parameter.data = parameter.data.to(_stored(layer, name, store)).to(parameter.dtype)


@torch.no_grad()
def stored_copies(model: nn.Module, adapters: Sequence[str], store: Store) -> list[LayerLoss]:
    """Measure the loss of the modules trained whole, whose update is their difference from the base's own."""
    losses = []
    for name, module in model.named_modules():
        if not isinstance(module, SavedModule):
            continue
        adapter = next((adapter for adapter in adapters if adapter in module.modules_to_save), None)
        if adapter is None:
            continue
        own = dict(module.original_module.named_parameters())
        pairs = [
            (own[key], trained) for key, trained in module.modules_to_save[adapter].named_parameters() if key in own
        ]
        dense = [(base, trained) for base, trained in pairs if base.shape == trained.shape and base.is_floating_point()]
        parts = [(base, trained.to(store(base)), trained.float() - base.float()) for base, trained in dense]
        if parts:
            losses.append(LayerLoss(name, *_sum_norms(parts)))
    return losses


def worst_loss(losses: Sequence[LayerLoss]) -> LayerLoss | None:
    """Return the layer that loses the largest share among those whose update can be seen; None without any update."""
    largest = max((loss.relative_update for loss in losses if loss.update), default=0.0)
    seen = [loss for loss in losses if loss.update and loss.relative_update >= NEGLIGIBLE * largest]
    return max(seen, key=lambda loss: loss.share, default=None)
