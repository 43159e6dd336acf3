"""Checks of an adapter's tensors: against the model they are loaded into, for NaN and infinity, and for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.adapter.tensor_names import PREFIX, SHARED, mirrored_names, tensor_names, vocabulary_names
from lorakeet.errors import AdapterError
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.model import LoraModel
from lorakeet.quant.state_dict import stored_shape
from lorakeet.security.shown import cut

#: Tensors of one sort that a message names.
_SHOWN = 5
#: Tensors of one sort that the list of differences names; more are counted.
_LISTED = 500
#: Rank up to which layers are made without a look at the tensors.
_LARGE_RANK = 1024


@dataclass(frozen=True)
class Differences:
    """The differences between the tensors of a file and those that a model expects.

    Attributes:
        names: Key of the file -> key of the state dict, for the tensors to copy.
        missing: Keys that the file lacks.
        unexpected: Keys that the model lacks.
        shapes: A text for each tensor of another shape.
        untied: A text for each two tensors that belong to one parameter and differ.
        nonfinite: A text about NaN and infinite values, if there are any.
        vocabulary: Rows of the file's embedding or head, if it has one.
    """

    names: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    nonfinite: str | None = None
    vocabulary: int | None = None

    def raise_if_any(self, name: str | Path) -> None:
        """Report all differences at once.

        Raises:
            AdapterError: the adapter ``name`` does not fit the model.
        """
        sorts = {
            "missing tensors": self.missing,
            "unexpected tensors": self.unexpected,
            "wrong shapes": self.shapes,
            "layers that share their weight here, with tensors that differ": self.untied,
        }
        errors = [f"{sort} ({len(found)}): {_listed(found)}" for sort, found in sorts.items() if found]
        errors += [self.nonfinite] if self.nonfinite else []
        if not errors:
            return
        hint = "is it the right base, and the adapter_config.json that belongs to the tensors?"
        if self.shapes and self.vocabulary:
            resize = f"model.resize_token_embeddings({self.vocabulary})"
            hint = f"the base's vocabulary was resized: {resize} before loading the adapter"
        raise AdapterError(f"adapter {str(name)!r} does not fit this model: {'; '.join(errors)}", hint)


def compare(
    model: LoraModel,
    adapter: str,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    unfrozen: Mapping[str, str] | None = None,
) -> Differences:
    """Compare the tensors of a file with those that the model expects.

    Args:
        model: A model that has the adapter.
        adapter: The adapter's name in the model.
        tensors: The tensors of the file.
        state: The model's state dict.
        unfrozen: Key of the file -> key of the state dict, for parameters of the base that trained with the adapter.
    """
    expected, vocabulary = tensor_names(model, adapter) | (dict(unfrozen or {})), vocabulary_names(model)
    # the embedding's own weight is in the file only if PEFT saved it
    missing = sorted(key for key in expected if key not in tensors and not key.endswith(".base_layer.weight"))
    names = {key: own for key, own in {**expected, **vocabulary}.items() if key in tensors}
    mirrored = mirrored_names(model, adapter)
    unexpected = sorted(key for key in tensors if key not in names and key not in mirrored and not _is_copy(key))
    shapes = tuple(_shape_errors(model, names, tensors, state))
    return Differences(
        names,
        tuple(missing),
        tuple(unexpected),
        shapes,
        () if shapes else tuple(_untied(names, mirrored, tensors, state)),
        nonfinite_error(tensors),
        next((len(tensors[key]) for key in vocabulary if key in tensors), None),
    )


def _listed(found: tuple[str, ...]) -> str:
    more = [f"and {len(found) - _LISTED:,} more"] if len(found) > _LISTED else []
    return ", ".join([*(cut(text, 300) for text in found[:_LISTED]), *more])


def _is_copy(key: str) -> bool:
    """Whether a key is one of the copies that PEFT writes of biases which the file has under their own names too."""
    return key.endswith((".original_module.bias", ".modules_to_save.bias"))


def _shape_errors(
    model: LoraModel, names: Mapping[str, str], tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> list[str]:
    errors = []
    for key, own in names.items():
        found, expected = tuple(tensors[key].shape), stored_shape(model, state, own)
        if found != expected:
            errors.append(f"{key} is {list(found)}, expected {list(expected)}")
    return errors


def _untied(
    names: Mapping[str, str],
    mirrored: Mapping[str, tuple[str, bool]],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> list[str]:
    """List tensors that would be copied into one parameter, or into one and its mirror, and are not the same."""
    found: list[str] = []
    first_of: dict[tuple[int, torch.Size], str] = {}
    for key, own in names.items():
        first = first_of.setdefault((state[own].data_ptr(), state[own].shape), key)
        if state[own].numel() and not torch.equal(tensors[key], tensors[first]):
            found.append(f"{first} and {key}")
    for key, (first, transposed) in mirrored.items():
        if key in tensors and first in tensors:
            other = tensors[first].T if transposed else tensors[first]
            if not torch.equal(tensors[key], other):
                found.append(f"{first} and {key}")
    return found


def check_ranks(config: PeftConfig, tensors: Mapping[str, Tensor], name: str | Path) -> None:
    """Check that the settings ask for no rank that is far above those of the tensors, before layers are made by them.

    Raises:
        AdapterError: they do.
    """
    wanted = max(config.r, *config.rank_pattern.values(), 0)
    found = max((len(tensor) for key, tensor in tensors.items() if ".lora_" in key and tensor.ndim), default=0)
    if wanted > max(found, _LARGE_RANK):
        raise AdapterError(
            f"adapter {str(name)!r} has rank {wanted:,} in its settings, and no tensor with as many rows",
            "copy both files again: they do not belong together",
        )


def check_trained(tensors: Mapping[str, Tensor], name: str | Path, allow_untrained: bool = False) -> None:
    """Refuse an adapter that changes nothing.

    Args:
        tensors: The tensors of its file.
        name: Folder or hub id, for messages.
        allow_untrained: Only warn of it.

    Raises:
        AdapterError: every B is zero.
    """
    if is_untrained(tensors):
        message = f"adapter {str(name)!r} is untrained: every B is zero, so it changes nothing"
        if not allow_untrained:
            raise AdapterError(message, "train it; allow_untrained=True (--allow-untrained) takes it all the same")
        warn(message)


def nonfinite_error(tensors: Mapping[str, Tensor]) -> str | None:
    """Return a text that names the tensors with NaN or infinite values; None if all are finite."""
    names = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if not names:
        return None
    return f"NaN or infinite values in {len(names)} tensors: {', '.join(sorted(names)[:_SHOWN])}"


def is_untrained(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the adapter changes nothing: in each layer A or B is all zero, and the file has nothing else."""
    layers: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX) and key.startswith(SHARED):
            continue  # random matrices
        if ".lora_" not in key:
            if not key.endswith(".base_layer.weight"):
                return False  # a module trained whole, or biases: cannot be judged without the base
            continue
        layers.setdefault(key.rpartition(".lora_")[0], []).extend([] if key.endswith(".bias") else [tensor])
    return bool(layers) and not any(all(bool(tensor.any()) for tensor in own) for own in layers.values())
