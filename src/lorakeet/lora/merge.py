"""Merge adapters into the base, W' = W₀ + s·B·A, and check that the outputs stay the same.

Hu et al. 2021, section 4.1: no additional inference latency. Before the original weights are released, the merged and the
unmerged model run a probe batch, and the largest difference of their outputs is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.errors import MergeError
from lorakeet.log import info, warn
from lorakeet.lora.config import refuse_unknown
from lorakeet.lora.layer import LoraLayer
from lorakeet.model_facts import embedding_rows, padding_token
from lorakeet.quant.protocol import is_quantized, weight_dtype

#: Share of the largest output. Largest accepted difference between merged and unmerged outputs, by the weights' dtype.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class MergeReport:
    """The effect of a merge, measured on the probe.

    Attributes:
        layers: Number of merged layers.
        error: Largest absolute difference between merged and unmerged outputs.
        effect: Largest absolute difference between the outputs with the adapter and without.
        scale: Largest absolute output of the unmerged model.
        tolerance: Largest accepted ``error / scale``.
    """

    layers: int
    error: float
    effect: float
    scale: float
    tolerance: float

    def describe(self) -> str:
        """Return one line of text."""
        return (
            f"merged {self.layers} layers: merged and unmerged outputs differ by at most {self.error:.2g} "
            f"(the adapter changes them by up to {self.effect:.2g}; the largest is {self.scale:.3g})"
        )


class MergeMethods(nn.Module):
    """The methods of :class:`~lorakeet.lora.model.LoraModel` that merge."""

    def merge_adapter(
        self: Any,
        adapter_names: Sequence[str] | None = None,
        *,
        probe: dict[str, Tensor] | None = None,
        tolerance: float | None = None,
        **peft_only: Any,
    ) -> MergeReport:
        """Merge ΔW into the base's weights, checked on a probe batch; :meth:`unmerge` restores the very same bits.

        Args:
            adapter_names: Names of the adapters; left out: the active ones.
            probe: Keyword arguments of ``forward`` to compare on; left out: a fixed batch of token ids.
            tolerance: Largest accepted difference, as a share of the largest output; left out: by dtype.
            **peft_only: Arguments that only PEFT has; each is refused by name.

        Raises:
            MergeError: merged and unmerged outputs differ by more, or the base cannot hold the update. The model is as
                before then.
        """
        refuse_unknown("merge_adapter", peft_only, {"safe_merge"})
        names = list(adapter_names or self.active_adapters)
        for name in names:
            self._check_known(name)
        self._check_conflict(names)
        return checked_merge(self, names, probe=probe, tolerance=tolerance)

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
    ) -> nn.Module:
        """Merge, then return the plain model without any LoRA layer.

        If the adapter changes one of two tied weights (a head, say), the model's config no longer ties them.

        Args:
            progressbar: Accepted for code written for PEFT, without effect.
            safe_merge: The same; every merge is checked.
            adapter_names: Names of the adapters; left out: the active ones.
            probe: As in :meth:`merge_adapter`.
            tolerance: As in :meth:`merge_adapter`.

        Raises:
            MergeError: As in :meth:`merge_adapter`.
        """
        if not any(layer.merged_adapters for layer in self.lora_layers()):
            self.merge_adapter(adapter_names, probe=probe, tolerance=tolerance)
        for part in self.lora_parts():
            if isinstance(part, LoraLayer):
                part.forget_originals()
            else:
                part.original_module = part.current
        model = self.unload(_merged=True)
        untie(model)
        return model


def checked_merge(
    model: Any, adapters: list[str], *, probe: dict[str, Tensor] | None = None, tolerance: float | None = None
) -> MergeReport:
    """Merge the adapters into every layer of ``model``, compare on the probe, and unmerge if the outputs differ too much.

    Args:
        model: A :class:`~lorakeet.lora.model.LoraModel`.
        adapters: Names of the adapters.
        probe: Keyword arguments of ``forward`` to compare on; None: a fixed batch.
        tolerance: Largest accepted difference, as a share of the largest output; None: as the weights' format has it.

    Raises:
        MergeError: a weight cannot hold the update, or the outputs differ by more; the model is as before then.
    """
    layers: list[LoraLayer] = [layer for layer in model.lora_layers() if any(name in layer.r for name in adapters)]
    _check_mergeable(model, layers, adapters)
    accepted = max(map(_tolerance, layers)) if tolerance is None else tolerance
    was_training, was_active = model.training, model.switch.active
    model.eval()
    model.switch.active = tuple(adapters)
    probes = _Probe(model, layers, probe)
    try:
        expected = probes.outputs()
        with model.disable_adapter():
            bare = probes.outputs()
        with torch.no_grad():
            for layer in layers:
                layer.merge_(adapters)
        report = _compare(expected, probes.outputs(), bare, len(layers), accepted)
    except BaseException:
        model.unmerge()
        model.switch.active = was_active
        raise
    finally:
        model.train(was_training)
    if not report.error <= accepted * report.scale:  # also when it is NaN
        model.unmerge()
        model.switch.active = was_active
        raise MergeError(
            f"merged and unmerged outputs differ by {report.error:.3g} (limit {accepted * report.scale:.3g}); "
            "nothing was merged",
            f"merge in a wider number format than {_dtype_name(layers[0].base_layer.weight)}",
        )
    info(report.describe())
    if report.effect == 0.0:
        warn(f"adapter {', '.join(adapters)} changes nothing on the probe: has it been trained?")
    return report


def _dtype_name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _check_mergeable(model: Any, layers: list[LoraLayer], adapters: list[str]) -> None:
    if any(layer.merged_adapters for layer in layers):
        raise MergeError("an adapter is merged already", "unmerge first")
    if not layers:
        raise MergeError(f"adapter {', '.join(adapters)} has no LoRA layer in this model", "check the adapter's name")
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            _check_layer(name, layer, [adapter for adapter in adapters if adapter in layer.r])


def _check_layer(name: str, layer: LoraLayer, adapters: list[str]) -> None:
    """Raise a :class:`MergeError` if the layer's weight or bias cannot hold the updates of ``adapters``."""
    weight = layer.base_layer.weight
    if weight.is_meta:
        raise MergeError(
            f"{name} is on the meta device or offloaded: its weight is not here to merge into",
            "load the whole base on one device",
        )
    if _tolerance(layer) is None:
        raise MergeError(
            f"{name} has its weight in {_dtype_name(weight)}, where the update would be lost in rounding",
            "load the base in full precision (fp32 or bf16) and merge there",
        )
    if adapters and (error := layer.merge_error()):
        raise MergeError(f"{name} {error}", "use the adapter unmerged, or train it with this layer in exclude_modules")
    has_bias = getattr(layer.base_layer, "bias", None) is not None
    if not has_bias and any(layer.bias_delta(adapter) is not None for adapter in adapters):
        raise MergeError(
            f"{name} has no bias, so the adapter's lora_bias cannot be merged into it", "use the adapter unmerged"
        )


def _tolerance(layer: LoraLayer) -> Any:
    """Return the largest accepted difference as a share of the largest output; None: merging would lose the update."""
    base = layer.base_layer
    return base.quantized_weight().merge_tolerance if is_quantized(base) else TOLERANCE.get(weight_dtype(base))


class _Probe:
    """A fixed batch: outputs of the whole model if it reads token ids, else of each layer on its own."""

    def __init__(self, model: Any, layers: list[LoraLayer], given: dict[str, Tensor] | None) -> None:
        self.model, self.layers = model, layers
        self.inputs = given if given is not None else token_probe(model)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        if self.inputs is not None:
            return [_first_tensor(self.model(**self.inputs)).float()]
        return [layer(layer.probe()).float() for layer in self.layers]


def token_probe(model: Any) -> dict[str, Tensor] | None:
    """Build two rows of 16 fixed pseudo-random token ids, for a model that reads ``input_ids``; else None.

    One row where no padding token is known: some classifiers refuse two rows without one. For an encoder-decoder each row
    ends with the only end token in it, the position that BART's and T5's classifiers use.
    """
    config = getattr(model, "config", None)
    vocabulary = embedding_rows(model)
    if not vocabulary or getattr(model, "main_input_name", None) != "input_ids":
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 16), generator=generator).to(model.get_input_embeddings().weight.device)
    ids = ids if padding_token(config) is not None else ids[:1]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and getattr(config, "is_encoder_decoder", False):
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**both, "decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else both


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]


def _compare(
    expected: list[Tensor], merged: list[Tensor], bare: list[Tensor], layers: int, accepted: float
) -> MergeReport:
    def largest(a: list[Tensor], b: list[Tensor]) -> float:
        return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))

    scale = max(float(x.abs().max()) for x in expected)
    return MergeReport(layers, largest(expected, merged), largest(expected, bare), scale, accepted)


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
