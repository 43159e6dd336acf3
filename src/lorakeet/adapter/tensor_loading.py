"""Copy an adapter's tensors into a model: checked first, and then all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorakeet.adapter.serialization import read_notes, read_tensors
from lorakeet.adapter.tensor_checks import check_trained, compare
from lorakeet.adapter.tensor_names import PREFIX, vocabulary_names
from lorakeet.adapter.unfrozen import NOTE, remember, unfrozen_keys
from lorakeet.errors import AdapterError
from lorakeet.log import info, warn
from lorakeet.lora.model import LoraModel
from lorakeet.quant.state_dict import has_weight, write_weight


def load_tensors(
    model: LoraModel,
    adapter: str,
    tensors: Mapping[str, Tensor],
    name: str | Path,
    *,
    allow_untrained: bool = False,
    allow_new_base: bool | None = None,
    unfrozen: Iterable[str] = (),
) -> None:
    """Check the tensors against the adapter that ``model`` expects, then copy them in.

    Args:
        model: A model that has the adapter.
        adapter: The adapter's name in the model.
        tensors: The tensors of the file.
        name: Folder or hub id, for messages.
        allow_untrained: Only warn if every B is zero.
        allow_new_base: Accept weights of the base that this adapter brings, although others use it too. None: only if it has
            no other adapter; False: never.
        unfrozen: Names of parameters of the base that the adapter's notes list.

    Raises:
        AdapterError: tensors are missing, unexpected, of the wrong shape or not finite, or the adapter is untrained. Or it
            brings weights of the base that would change the answers of other adapters.
    """
    state = model.state_dict()
    base_keys = unfrozen_keys(model, unfrozen)
    differences = compare(model, adapter, tensors, state, base_keys)
    differences.raise_if_any(name)
    check_trained(tensors, name, allow_untrained)
    _copy_in(model, adapter, differences.names, tensors, state, base_keys, allow_new_base)
    remember(model, base_keys.values())


def check_tensors(model: LoraModel, adapter: str, folder: Path) -> None:
    """Check that the files in ``folder`` fit the adapter of ``model``, without loading them.

    Raises:
        AdapterError: see :func:`load_tensors`.
    """
    base_keys = unfrozen_keys(model, read_notes(folder).get(NOTE, ()))
    compare(model, adapter, read_tensors(folder), model.state_dict(), base_keys).raise_if_any(folder)


class LoadResult(NamedTuple):
    """Keys that an adapter's tensors lacked, and keys that the model lacks.

    Attributes:
        missing_keys: Keys of the model.
        unexpected_keys: Keys of the tensors.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def put_tensors(
    model: LoraModel, adapter: str, tensors: Mapping[str, Tensor], *, skip_shapes: bool = False
) -> LoadResult:
    """Copy those tensors in that the model has a place for, in the adapter or in the base.

    Args:
        model: A model that has the adapter.
        adapter: The adapter's name in the model.
        tensors: Tensors by the keys of a file.
        skip_shapes: Leave out tensors of another shape, with a warning.

    Raises:
        AdapterError: a tensor has another shape, or NaN or infinite values.
    """
    state = model.state_dict()
    of_base = {key: own for key in tensors if (own := key.removeprefix(PREFIX)) in state}
    found = compare(model, adapter, tensors, state, of_base)
    if skip_shapes and found.shapes:
        warn(f"tensors of another shape are left out: {', '.join(found.shapes[:5])}")
        unfit = {shape.partition(" is ")[0] for shape in found.shapes}
        fit = {key: value for key, value in tensors.items() if key not in unfit}
        found = compare(model, adapter, fit, state, {key: own for key, own in of_base.items() if key in fit})
    replace(found, missing=(), unexpected=()).raise_if_any(adapter)
    _copy_in(model, adapter, found.names, tensors, state, of_base, True)
    return LoadResult(list(found.missing), list(found.unexpected))


@torch.no_grad()
def _copy_in(
    model: LoraModel,
    adapter: str,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    unfrozen: Mapping[str, str],
    allow_new_base: bool | None,
) -> None:
    """Copy the tensors into the state dict, quantized where that is; all or none, and the base's only where they differ."""
    of_base = {**vocabulary_names(model), **unfrozen}
    own_of_base = [key for key, own in names.items() if own.endswith(".base_layer.weight") or key in of_base]
    same = {key for key in own_of_base if has_weight(model, state, names[key], tensors[key])}
    if len(same) < len(own_of_base):
        _check_base_weights(model, adapter, [key for key in own_of_base if key not in same], allow_new_base)
    written: list[tuple[Tensor, Tensor]] = []
    try:
        for key, own in names.items():
            if key not in same:
                written.append((state[own], state[own].clone()))
                write_weight(model, state, own, tensors[key])
    except BaseException:
        for tensor, before in written:
            tensor.copy_(before)
        raise


def _check_base_weights(model: LoraModel, adapter: str, keys: Sequence[str], allow: bool | None) -> None:
    """Refuse weights that differ from this base's while others answer with it."""
    listed = ", ".join(key.removeprefix(PREFIX) for key in keys)
    others = [other for other in model.peft_config if other != adapter]
    if allow is False or (others and not allow):
        changed = ", ".join(others) or "the base"
        raise AdapterError(
            f"adapter {adapter!r} brings its own {listed}, which would change the answers of {changed}",
            "load it on a base of its own",
        )
    info(f"{listed} is taken from the adapter: it differs from the base's")
