"""Merge adapters into the base, W' = W₀ + s·B·A, and measure what the merge loses.

Hu et al. 2021, section 4.1: no additional inference latency. Each weight is formed in fp32 (fp64 for a base in fp64) and
rounded once to the base's own number format. Two things are measured before the original weights are released: the share
of each layer's update that rounding takes (:mod:`lorakeet.lora.checks.merge_loss`), and the largest difference between
merged and unmerged outputs on a probe (:mod:`lorakeet.lora.checks.merge_probe`). Both are held against the adapter's effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.errors import MergeError
from lorakeet.eval_mode import evaluating
from lorakeet.log import info, warn
from lorakeet.lora.checks.merge_loss import (
    ACCEPTED_LOSS,
    LayerLoss,
    Store,
    merge_layer,
    round_merged,
    stored_copies,
    worst_loss,
)
from lorakeet.lora.checks.merge_probe import Probe, largest_difference
from lorakeet.lora.config import refuse_unknown
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.lifecycle.merged import merged_names
from lorakeet.lora.peft_names.own_switch import chosen_names, merged_here, switched_for_merge
from lorakeet.lora.peft_names.words import MERGED_ALREADY, NO_BIAS_TO_MERGE
from lorakeet.quant.protocol import is_quantized, is_rounded

#: Share of the adapter's effect. Largest accepted difference of the outputs beyond their own rounding: a merged weight that
#: is formed wrongly differs by more, and sums in another order by far less.
TOLERANCE = 1e-3
#: The next steps for a merge that loses the update.
LOSS_HINT = (
    "store it in a wider format: --dtype fp32 (in memory: model.float() first); "
    "--accept-loss (accept_loss=True) merges all the same"
)


@dataclass(frozen=True)
class MergeReport:
    """The effect of a merge, measured on the probe and in the weights.

    Attributes:
        layers: Number of merged layers.
        error: Largest absolute difference between merged and unmerged outputs.
        effect: Largest absolute difference between the outputs with the adapter and without.
        scale: Largest absolute output of the unmerged model.
        tolerance: Largest accepted ``error / effect``, beside the outputs' own rounding.
        lost: Largest share of a layer's update that the stored weight does not have.
        stored: Number format of the merged weights, such as ``float32``.
    """

    layers: int
    error: float
    effect: float
    scale: float
    tolerance: float = TOLERANCE
    lost: float = 0.0
    stored: str = ""

    def describe(self) -> str:
        """Return one line of text."""
        formed = "float64" if self.stored == "float64" else "float32"
        return (
            f"merged {self.layers} layers, formed in {formed} and stored in {self.stored}: "
            f"the rounding error is at most {self.lost:.2g} of a layer's update; "
            f"merged and unmerged outputs differ by at most {self.error:.2g} "
            f"(the adapter changes them by up to {self.effect:.2g}; the largest is {self.scale:.3g})"
        )


class MergeMethods(nn.Module):
    """The methods of :class:`~lorakeet.lora.model.LoraModel` that merge."""

    def merge_adapter(
        self: Any,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = True,
        *,
        probe: dict[str, Tensor] | None = None,
        tolerance: float | None = None,
        accept_loss: bool | None = None,
        store: Store | None = None,
        **peft_only: Any,
    ) -> MergeReport:
        """Merge ΔW into the base's weights, measured; :meth:`unmerge` restores the very same bits.

        Adapters that are merged already stay so. Those of one call after another give the weights of one call with all of
        them, since the sum is rounded once.

        Args:
            adapter_names: Names of the adapters; left out: the active ones, of each layer.
            safe_merge: Accepted for code written for PEFT; every merge is checked.
            probe: Keyword arguments of ``forward`` to compare on; left out: a fixed batch of token ids.
            tolerance: Largest accepted difference of the outputs, as a share of the adapter's effect.
            accept_loss: Whether to merge although rounding takes more than half of a layer's update. Left out: with a
                warning in floating formats, not in quantized ones.
            store: Number format that the caller stores a parameter in, if it is not the parameter's own.
            **peft_only: Arguments that only PEFT has; each is refused by name.

        Raises:
            MergeError: merged and unmerged outputs differ, the base cannot hold the update, or the merged weights are not
                finite. The model is as before then.
        """
        refuse_unknown("merge_adapter", peft_only, set())
        names = list(adapter_names or chosen_names(self))
        self._check_names(names)
        already = merged_names(self)
        new = [name for name in dict.fromkeys(names) if name not in already]
        if not new:
            warn(f"{MERGED_ALREADY}: {', '.join(already)}")
            return MergeReport(0, 0.0, 0.0, 0.0)
        if already:
            warn(f"adapters {', '.join(already)} are merged already; {', '.join(new)} is added to them")
        self._check_conflict([*already, *new])
        with switched_for_merge(self, [*already, *new] if adapter_names else []):
            return checked_merge(
                self, [*already, *new], probe=probe, tolerance=tolerance, accept_loss=accept_loss, store=store
            )

    def unmerge(self: Any) -> None:
        """Undo :meth:`merge_adapter`, bit for bit."""
        for layer in self.lora_layers():
            layer.unmerge_()

    unmerge_adapter = unmerge

    def merge_and_unload(
        self: Any,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        *,
        probe: dict[str, Tensor] | None = None,
        tolerance: float | None = None,
        accept_loss: bool | None = None,
    ) -> nn.Module:
        """Merge, then return the plain model without any LoRA layer.

        If the adapter changes one of two tied weights (a head, say), the model's config no longer ties them.

        Args:
            progressbar: Accepted for code written for PEFT, without effect.
            safe_merge: The same; every merge is checked.
            adapter_names: Names of the adapters; left out: the active ones.
            probe: As in :meth:`merge_adapter`.
            tolerance: As in :meth:`merge_adapter`.
            accept_loss: As in :meth:`merge_adapter`.

        Raises:
            MergeError: As in :meth:`merge_adapter`.
        """
        if {*(adapter_names or chosen_names(self))} - {*merged_names(self)}:
            self.merge_adapter(adapter_names, probe=probe, tolerance=tolerance, accept_loss=accept_loss)
        for part in self.lora_parts():
            if isinstance(part, LoraLayer):
                part.forget_originals()
            else:
                part.original_module = part.current
        model = self.unload(_merged=True)
        untie(model)
        return model


def checked_merge(
    model: Any,
    adapters: list[str],
    *,
    probe: dict[str, Tensor] | None = None,
    tolerance: float | None = None,
    accept_loss: bool | None = None,
    store: Store | None = None,
) -> MergeReport:
    """Merge the adapters into every layer of ``model``, measure, and undo it if the merge is wrong or loses the update.

    Args:
        model: A :class:`~lorakeet.lora.model.LoraModel`.
        adapters: Names of the adapters, including those that are merged already.
        probe: Keyword arguments of ``forward`` to compare on; None: a fixed batch.
        tolerance: Largest accepted difference of the outputs, as a share of the effect; None: by the number format.
        accept_loss: As in :meth:`MergeMethods.merge_adapter`.
        store: As in :meth:`MergeMethods.merge_adapter`.

    Raises:
        MergeError: a weight cannot hold the update, or the outputs differ; the model is as before then.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and merged_here(layer)
    }
    _check_mergeable(layers, adapters, accept_loss)
    already = [(layer, layer.merged_adapters) for layer in layers.values() if layer.merged_adapters]
    enabled = model.switch.enabled
    try:
        with evaluating(model):
            model.unmerge()
            model.switch.enabled = True
            report, losses = _measured_merge(model, layers, adapters, probe, tolerance, store)
        worst = worst_loss(losses)
        if worst and worst.share > ACCEPTED_LOSS:
            _tell_loss(worst, losses, report, accept_loss)
    except BaseException:
        model.unmerge()
        for layer, merged in already:
            layer.merge_(merged)
        raise
    finally:
        model.switch.enabled = enabled
    info(report.describe())
    if not any(loss.update for loss in losses):
        warn(f"adapter {', '.join(adapters)} changes nothing: has it been trained?")
    return report


def _measured_merge(
    model: Any,
    layers: dict[str, LoraLayer],
    adapters: list[str],
    probe: dict[str, Tensor] | None,
    tolerance: float | None,
    store: Store | None,
) -> tuple[MergeReport, list[LayerLoss]]:
    """Merge every layer, and measure outputs and weights; the adapters are active and unmerged.

    Raises:
        MergeError: the outputs differ, or a merged weight is not finite.
    """
    probes = Probe(model, list(layers.values()), probe)
    expected = probes.outputs()
    with model.switch.disabled():
        effect = largest_difference(expected, probes.outputs())
    merges = (merge_layer(name, layer, merged_here(layer), store) for name, layer in layers.items())
    losses = [loss for loss in merges if loss]
    merged, scale = probes.outputs(), max((float(x.abs().max()) for x in expected), default=0.0)
    _check_outputs(largest_difference(expected, merged), effect, scale, probes.noise, tolerance)
    if store:
        losses += stored_copies(model, adapters, store)
        round_merged(layers.values(), store)
        merged = probes.outputs()
    worst, formats = worst_loss(losses), {_stored(layer, store) for layer in layers.values()}
    report = MergeReport(
        len(layers),
        largest_difference(expected, merged),
        effect,
        scale,
        TOLERANCE if tolerance is None else tolerance,
        worst.share if worst else 0.0,
        " and ".join(sorted(formats)),
    )
    return report, losses


def _check_outputs(error: float, effect: float, scale: float, noise: float | None, tolerance: float | None) -> None:
    """Raise a :class:`MergeError` if outputs differ by more than a share of the effect and their own rounding.

    Args:
        error: Largest difference between merged and unmerged outputs.
        effect: Largest difference between outputs with and without the adapter.
        scale: Largest output.
        noise: Share of the largest output that the outputs' own rounding makes; None: not known.
        tolerance: Accepted share of the effect; None: :data:`TOLERANCE` where the rounding is known.
    """
    if noise is None and tolerance is None:
        return
    limit = (TOLERANCE if tolerance is None else tolerance) * effect + (noise or 0.0) * scale
    if not error <= limit:  # also when it is NaN
        raise MergeError(
            f"merged and unmerged outputs differ by {error:.3g}, where the adapter changes them by {effect:.3g} "
            f"(limit {limit:.3g}); nothing was merged",
            "use the adapter unmerged",
        )


def _tell_loss(worst: LayerLoss, losses: Sequence[LayerLoss], report: MergeReport, accepted: bool | None) -> None:
    """Warn of a merge that loses an update, or raise a :class:`MergeError` if it is not accepted."""
    count = sum(loss.share > ACCEPTED_LOSS for loss in losses)
    message = (
        f"{report.stored} is too coarse for this adapter: in {count} of {len(losses)} layers the rounding error is more "
        f"than {ACCEPTED_LOSS:.0%} of the update ({worst.share:.0%} in {worst.name})"
    )
    if accepted is False:
        raise MergeError(f"{message}; nothing was merged", LOSS_HINT)
    warn(f"{message}: the merged model is not the adapter's; {LOSS_HINT}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored(layer: LoraLayer, store: Store | None) -> str:
    """Return the number format that a layer's merged weight is stored in."""
    quantized = is_rounded(layer.base_layer)
    own = layer.originals.get("weight", layer.base_layer.weight)
    return _dtype_name(own.dtype if quantized or store is None else store(own))


def _check_mergeable(layers: dict[str, LoraLayer], adapters: list[str], accept_loss: bool | None) -> None:
    if not layers:
        raise MergeError(f"adapter {', '.join(adapters)} has no LoRA layer in this model", "check the adapter's name")
    for name, layer in layers.items():
        _check_layer(name, layer, merged_here(layer), accept_loss)


def _check_layer(name: str, layer: LoraLayer, adapters: list[str], accept_loss: bool | None) -> None:
    """Raise a :class:`MergeError` if the layer's weight or bias cannot hold the updates of ``adapters``."""
    base, weight = layer.base_layer, layer.base_layer.weight
    if weight.is_meta:
        raise MergeError(
            f"{name} is on the meta device or offloaded: its weight is not here to merge into",
            "load the whole base on one device",
        )
    coarse = not base.quantized_weight().mergeable if is_quantized(base) else not weight.is_floating_point()
    if coarse and not (accept_loss and is_quantized(base)):
        raise MergeError(
            f"{name} has its weight in {_dtype_name(weight.dtype)}, where the update would be lost in rounding",
            "load the base in full precision (fp32 or bf16) and merge there: the adapter fits it",
        )
    if error := layer.merge_error():
        raise MergeError(f"{name} {error}", "use the adapter unmerged, or train it with this layer in exclude_modules")
    has_bias = getattr(base, "bias", None) is not None
    if not has_bias and any(layer.bias_delta(adapter) is not None for adapter in adapters):
        raise MergeError(f"{NO_BIAS_TO_MERGE}: {name}", "use the adapter unmerged")


def untie(model: nn.Module) -> None:
    """Mark head and input embedding as untied in the config if they are, or loading would tie them again."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embedding.weight:
        config.tie_word_embeddings = False
        text = config.get_text_config()
        text.tie_word_embeddings = False
        info("the head and the input embedding are no longer tied: the saved model holds both")
