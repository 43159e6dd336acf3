"""Callback of the Trainer that logs how many directions of its rank the update uses, at every evaluation.

The singular values of ΔW = s·B·A come from products of A and of B with themselves. So a measurement takes a small part of
the time of the evaluation beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from lorakeet.lora.algebra.blocks import split_blocks
from lorakeet.lora.algebra.combine import stored_update
from lorakeet.lora.algebra.spectrum import Spectrum, singular_values
from lorakeet.lora.embedding import LoraEmbedding
from lorakeet.lora.initialization.taken_part import taken_parts
from lorakeet.lora.linear import LoraPair
from lorakeet.runs.metrics_log import MetricsLog

#: Share of each layer's energy ‖ΔW‖² that the rank needed keeps.
ENERGY = 0.99
#: Share of r. From here on an update needs all of its rank, so a higher one would be used.
ALL_USED = 0.9
#: Share of r. Up to here half of the rank, or more, holds next to nothing.
HALF_USED = 0.5


class SpectrumCallback(TrainerCallback):
    """Writer of the lines of ``metrics.jsonl`` with the ranks that the update uses, in the main process.

    Args:
        model: The model with the adapter.
        log: The run's log.
        adapter: The adapter's name.
    """

    def __init__(self, model: Any, log: MetricsLog, adapter: str = "default") -> None:
        self.model, self.log, self.adapter = model, log, adapter

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.append(state)

    def append(self, state: Any) -> None:
        """Add a line for this step, unless there is one or the adapter changes nothing yet."""
        step = state.global_step
        if any(line["step"] == step and "spectrum" in line for line in self.log.read()):
            return
        if figures := spectrum_figures(self.model, self.adapter):
            self.log.append({"step": step, "epoch": round(state.epoch or 0.0, 6), "spectrum": figures})


@torch.no_grad()
def spectrum_figures(model: Any, adapter: str) -> dict[str, dict[str, Any]]:
    """Return for each kind of layer ``{"r", "effective_rank", "rank_needed"}``; empty if the adapter changes nothing.

    ``effective_rank`` is the mean over the layers, ``rank_needed`` their smallest, median and largest rank for 99 % of the
    energy.

    Args:
        model: The model with the adapter.
        adapter: The adapter's name.
    """
    found: dict[str, list[tuple[int, Spectrum]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraPair | LoraEmbedding) and adapter in layer.r:
            found.setdefault(name.rpartition(".")[2], []).append((layer.r[adapter], _spectrum(layer, adapter)))
    learned = {kind: [one for one in layers if one[1].norm] for kind, layers in found.items()}
    return {kind: _of_kind(layers) for kind, layers in sorted(learned.items()) if layers}


def _spectrum(layer: Any, adapter: str) -> Spectrum:
    """Return the singular values of an adapter's update of the whole weight of its base."""
    update = stored_update(layer, adapter, 1.0)
    a, b = layer.variants[adapter].factors(layer, adapter, update.A.detach(), update.B.detach())
    a, b = a.cpu(), b.cpu()
    taken = taken_parts(layer).get(adapter)
    if taken is not None:  # ΔW = s·(B·A − B₀·A₀)
        a, b = torch.cat([a, taken.lora_A.cpu()]), torch.cat([b, -taken.lora_B.cpu()], dim=1)
    blocks = split_blocks(a, b, update.rank * (1 if taken is None else 2))
    return Spectrum(tuple(tuple(singular_values(*block, update.scaling)) for block in blocks))


def _of_kind(layers: list[tuple[int, Spectrum]]) -> dict[str, Any]:
    needed = [spectrum.rank_for(ENERGY) * len(spectrum.blocks) for _, spectrum in layers]
    effective = sum(spectrum.effective_rank for _, spectrum in layers) / len(layers)
    return {
        "r": max(r for r, _ in layers),
        "effective_rank": round(effective, 3),
        "rank_needed": [min(needed), median(needed), max(needed)],
    }


def verdict(spectrum: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Return whether r was ``too low``, ``too high`` or ``fits``, and a sentence for people.

    Args:
        spectrum: The result of :func:`spectrum_figures`.
    """
    r = max(kind["r"] for kind in spectrum.values())
    low, high = (choose(kind["rank_needed"][i] for kind in spectrum.values()) for i, choose in ((0, min), (2, max)))
    shares = [kind["rank_needed"][1] / kind["r"] for kind in spectrum.values()]
    text = f"{ENERGY:.0%} of each layer's update needs rank {low} to {high} of {r}"
    if median(shares) >= ALL_USED:
        return "too low", f"{text}: the rank limits the adapter, --r {2 * r} may learn more"
    if high <= HALF_USED * r:
        return "too high", f"{text}: --r {high} would do, and `lorakeet rank` makes the adapter smaller"
    return "fits", text
