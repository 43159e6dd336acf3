"""Merging that checks itself: the merged model must compute what the unmerged one did.

W' = W₀ + s·B·A (Hu et al. 2021, section 4.1: no additional inference latency). Before the originals are let go, both
models answer a probe batch, and the largest difference is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.errors import MergeError
from lorakeet.log import info, warn
from lorakeet.lora.layer import LoraLayer

#: Largest accepted difference as a share of the largest output, by the dtype of the merged weights.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, measured on the probe.

    Attributes:
        layers: Merged layers.
        error: Largest absolute difference between merged and unmerged outputs.
        effect: Largest absolute difference the adapter makes to the base's outputs.
        scale: Largest absolute output of the unmerged model.
        tolerance: Largest accepted ``error / scale``.
    """

    layers: int
    error: float
    effect: float
    scale: float
    tolerance: float

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"merged {self.layers} layers: outputs differ from the adapter's by at most {self.error:.2g} "
            f"(the adapter moves them by up to {self.effect:.2g}, they reach {self.scale:.3g})"
        )


def checked_merge(
    model: Any, adapters: list[str], *, probe: dict[str, Tensor] | None = None, tolerance: float | None = None
) -> MergeReport:
    """Merge the adapters into every layer of ``model``, compare on the probe, and go back if they differ too much."""
    layers: list[LoraLayer] = [layer for layer in model.lora_layers() if any(name in layer.r for name in adapters)]
    _refuse_unmergeable(model, layers, adapters)
    dtype = layers[0].base_layer.weight.dtype
    accepted = TOLERANCE[dtype] if tolerance is None else tolerance
    was_training, was_active = model.training, model.switch.active
    model.eval()
    model.switch.active = tuple(adapters)
    probes = _Probe(model, layers, probe)
    try:
        wanted = probes.answer()
        with model.disable_adapter():
            bare = probes.answer()
        with torch.no_grad():
            for layer in layers:
                layer.merge_(adapters)
        report = _compare(wanted, probes.answer(), bare, len(layers), accepted)
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
            f"the merged model is not the adapter's: outputs differ by {report.error:.3g}, expected at most "
            f"{accepted * report.scale:.3g}; nothing was merged",
            f"merge in a wider number format than {str(dtype).removeprefix('torch.')}",
        )
    info(report.describe())
    if report.effect == 0.0:
        warn(f"adapter {', '.join(adapters)} changes nothing on the probe: has it been trained?")
    return report


def _refuse_unmergeable(model: Any, layers: list[LoraLayer], adapters: list[str]) -> None:
    if any(layer.merged_adapters for layer in layers):
        raise MergeError("an adapter is merged already", "unmerge first")
    if not layers:
        raise MergeError(f"adapter {', '.join(adapters)} has no LoRA layer in this model")
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.base_layer.weight
        if weight.is_meta:
            raise MergeError(f"{name} lies on the meta device or is offloaded: its weight is not here to merge into")
        if not isinstance(weight, Tensor) or weight.dtype not in TOLERANCE:
            raise MergeError(
                f"{name} holds its weight as {weight.dtype}, which an update cannot be added to without losing it",
                "load the base in full precision (fp32 or bf16) and merge there",
            )
        if any(adapter in layer.r for adapter in adapters) and (why := layer.unmergeable()):
            raise MergeError(
                f"{name} {why}", "use the adapter unmerged, or train it with this layer in exclude_modules"
            )
        if getattr(layer.base_layer, "bias", None) is None and any(
            layer.bias_delta(adapter) is not None for adapter in adapters if adapter in layer.r
        ):
            raise MergeError(f"{name} has no bias, so the adapter's lora_bias cannot be merged into it")


class _Probe:
    """A fixed batch and how to run it: whole-model outputs where the model reads token ids, else each layer's own."""

    def __init__(self, model: Any, layers: list[LoraLayer], given: dict[str, Tensor] | None) -> None:
        self.model, self.layers = model, layers
        self.inputs = given if given is not None else token_probe(model)

    @torch.no_grad()
    def answer(self) -> list[Tensor]:
        if self.inputs is not None:
            return [_first_tensor(self.model(**self.inputs)).float()]
        return [layer(layer.probe()).float() for layer in self.layers]


def token_probe(model: Any) -> dict[str, Tensor] | None:
    """Two rows of 16 fixed pseudo-random token ids, for a model that reads ``input_ids``; else None.

    One row where no padding token is known, without which some classifiers refuse two. For an encoder-decoder each row ends
    with the only end token in it: BART's and T5's classifiers read off there.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(getattr(config, "get_text_config", lambda: config)(), "vocab_size", None)
    if not vocabulary or getattr(model, "main_input_name", None) != "input_ids":
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 16), generator=generator).to(model.get_input_embeddings().weight.device)
    ids = ids if getattr(config, "pad_token_id", None) is not None else ids[:1]
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


def _compare(wanted: list[Tensor], got: list[Tensor], bare: list[Tensor], layers: int, accepted: float) -> MergeReport:
    def largest(a: list[Tensor], b: list[Tensor]) -> float:
        return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))

    scale = max(float(x.abs().max()) for x in wanted)
    return MergeReport(layers, largest(wanted, got), largest(wanted, bare), scale, accepted)


def untie(model: nn.Module) -> None:
    """If head and input embedding no longer share a weight, say so in the config, or reloading would tie them again."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embedding.weight:
        config.tie_word_embeddings = False
        text = config.get_text_config()
        text.tie_word_embeddings = False
        info("the head and the input embedding are no longer tied: the saved model holds both")
