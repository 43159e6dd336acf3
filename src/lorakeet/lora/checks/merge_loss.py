"""The share of an update that a merge loses, measured in the weights: ‖W' − W − ΔW‖ / ‖ΔW‖ in each layer.

A weight in half precision takes steps of its own last bit. A bf16 number has 8 significant bits, so a weight w moves in steps
of |w|/256 to |w|/128, and a smaller change is rounded away. Outputs do not show this: in half precision their own rounding is
as large as the effect of a small adapter. So each merge is measured in the weights, in fp32 (fp64 for a base in fp64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.errors import MergeError
from lorakeet.lora.layer import LoraLayer
from lorakeet.quant.protocol import dense_weight, is_quantized, weight_dtype

#: Share of an update. From here on the rounding error has more than a quarter of the update's energy (0.5²). A merge that
#: takes more is refused by the command and told loudly in memory (measured in docs/lab.md).
ACCEPTED_LOSS = 0.5
#: Share of the largest relative update ‖ΔW‖/‖W‖ of a model. A layer whose own is smaller adds nothing that can be seen to
#: the outputs, so what rounding takes of it does not count.
NEGLIGIBLE = 0.01


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
def merge_layer(name: str, layer: LoraLayer, adapters: list[str], store: torch.dtype | None = None) -> LayerLoss | None:
    """Merge adapters into a layer, and measure the loss; None if the merge of a tied layer has done it already.

    Args:
        name: The layer's name.
        layer: The layer, unmerged.
        adapters: Names of the adapters.
        store: Number format that the merged weight will be stored in; None: that of the base.

    Raises:
        MergeError: The merged weight has NaN or infinite values.
    """
    if layer.merged_adapters:
        return None
    mine = [adapter for adapter in adapters if adapter in layer.r]
    before, updates = _weights(layer), layer.weight_updates(mine)
    bias, bias_updates = _bias(layer), [extra for adapter in mine if (extra := layer.bias_delta(adapter)) is not None]
    layer.merge_(mine)
    for replaced in layer.originals if store else ():
        parameter = getattr(layer.base_layer, replaced)
        parameter.data = parameter.data.to(store).to(parameter.dtype)
    parts = [*zip(before, _weights(layer), updates, strict=True)]
    parts += [(bias, _bias(layer), sum(bias_updates))] if bias_updates else []  # type: ignore[list-item]
    error, update, weight = (math.hypot(*norms) for norms in zip(*(_norms(*part) for part in parts), strict=True))
    if not math.isfinite(error):
        raise MergeError(
            f"the merged weight of {name} has NaN or infinite values",
            f"is adapter {', '.join(mine)} broken, or the range of {weight_dtype(layer.base_layer)} too small?",
        )
    return LayerLoss(name, error, update, weight)


def _weights(layer: LoraLayer) -> Sequence[Tensor]:
    """Return the base layer's weight in the slices of :meth:`LoraLayer.weight_updates`."""
    base = layer.base_layer
    return layer.weight_slices(dense_weight(base, torch.float32) if is_quantized(base) else base.weight.detach())


def _bias(layer: LoraLayer) -> Tensor | None:
    bias: Tensor | None = getattr(layer.base_layer, "bias", None)
    return None if bias is None else bias.detach()


def _norms(before: Tensor, after: Tensor, update: Tensor) -> tuple[float, float, float]:
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after, update = before.to(dtype), after.to(dtype), update.to(dtype)
    return float((after - before).sub_(update).norm()), float(update.norm()), float(before.norm())


def worst_loss(losses: Sequence[LayerLoss]) -> LayerLoss | None:
    """Return the layer that loses the largest share among those whose update can be seen; None without any update."""
    largest = max((loss.relative_update for loss in losses if loss.update), default=0.0)
    seen = [loss for loss in losses if loss.update and loss.relative_update >= NEGLIGIBLE * largest]
    return max(seen, key=lambda loss: loss.share, default=None)
