"""The layers of a model that a quantized base holds in fewer bits."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def layers_to_quantize(
    model: PreTrainedModel, embeddings: bool = True, keep: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Return the linear layers inside the base model, the input embedding and the head, by name.

    A task's head outside of the base model stays as it is, and so do the modules that ``keep`` names.

    Args:
        model: With its weights, or on the meta device.
        embeddings: Include the input embedding, a language model's head, and the layers that share their weight.
        keep: Modules to leave alone, named as seen from inside the base model.
    """
    prefix = model.base_model_prefix
    inside = getattr(model, prefix, None) if prefix else None
    start = f"{prefix}." if isinstance(inside, nn.Module) else ""
    kept = tuple(keep)
    vocabulary = vocabulary_layers(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        within = name.removeprefix(start)
        if any(f"{within}.".startswith(f"{k}.") for k in kept):
            continue
        if name in vocabulary:
            if embeddings:
                found[name] = module
        elif name.startswith(start) and isinstance(module, (nn.Linear, Conv1D)):
            found[name] = module
    return {name: module for name, module in found.items() if _is_whole_group_plain(name, vocabulary, found)}


def vocabulary_layers(model: PreTrainedModel) -> dict[str, str]:
    """Map each layer with a row for each token to the layer whose weight it shares, or to itself."""
    names = {id(module): name for name, module in model.named_modules()}
    asked = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {names[id(layer)]: names[id(layer)] for layer in asked if layer is not None and id(layer) in names}
    tied = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
        if target.endswith(".weight") and source.endswith(".weight")
    }
    for target, source in tied.items():
        if source in found or target in found:
            found |= {source: source, target: source}
    return found


def _is_whole_group_plain(name: str, vocabulary: dict[str, str], found: dict[str, nn.Module]) -> bool:
    """Whether all layers that share this one's weight are plain embeddings or linear layers.

    A subclass may do more, as an embedding that scales its rows. A layer outside of the vocabulary shares none.
    """
    if name not in vocabulary:
        return True
    group = [other for other, source in vocabulary.items() if source == vocabulary[name]]
    return all(type(found.get(other)) in (nn.Embedding, nn.Linear) for other in group)
