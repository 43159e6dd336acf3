"""Combine adapters by their files alone into the file of a new one; no base is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.adapter.inspect import SavedLayer, saved_layers
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.errors import AdapterError
from lorakeet.export.models import check_empty
from lorakeet.lora.algebra.combine import check_terms, combined_settings, log_energy
from lorakeet.lora.algebra.methods import CombinedLayer, LayerUpdate, Method, combine_layer, make_method
from lorakeet.rank.resize import factors, write_made
from lorakeet.workshop.pairing import AdapterFiles, read_adapters

#: Entries of ``lorakeet.json`` that a combined adapter shares with the first of its parts.
_KEPT = ("format", "lorakeet", "base", "task", "taught")


def combine_adapters(
    adapters: Sequence[str | Path],
    out: Path,
    weights: Sequence[float] | None = None,
    how: str = "linear",
    *,
    seed: int = 42,
    overwrite: bool = False,
    allow_other_base: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Write the combination of adapters as a new one; reads their files only.

    Args:
        adapters: Folders or hub ids.
        out: Folder to write.
        weights: One for each, of any sign; None: 1/n for sums, 1 for means (TIES).
        how: One of :data:`lorakeet.lora.algebra.methods.METHODS`.
        seed: Of the entries that DARE drops.
        overwrite: Replace the contents of ``out``.
        allow_other_base: Accept adapters of different bases.
        **settings: ``density``, ``rank``, ``majority_sign_method`` and ``clamp`` of the method.

    Returns:
        The result of :func:`combine_files`.

    Raises:
        AdapterError: An adapter cannot be read, or they cannot be combined in this way.
        OutputError: ``out`` is not empty or not writable.
    """
    method = make_method(how, generator=torch.Generator().manual_seed(seed), **settings)
    each = 1.0 if method.pruning.elect else 1 / max(1, len(adapters))
    given = [each] * len(adapters) if weights is None else weights
    folder = check_empty(out, overwrite)
    return combine_files(adapters, given, method, folder, allow_other_base=allow_other_base)


def combine_files(
    names: Sequence[str | Path], weights: Sequence[float], method: Method, out: Path, *, allow_other_base: bool = False
) -> dict[str, Any]:
    """Write the combination of adapters into ``out``; the tokenizer and the notes of the first come along.

    Args:
        names: Folders or hub ids.
        weights: One for each, of any sign.
        method: How to combine them.
        out: Folder to write, whole or not at all.
        allow_other_base: Accept adapters of different bases.

    Returns:
        ``{"path", "method", "adapters", "weights", "ranks", "parameters", "energy_kept"}``. ``ranks`` are by layer, and
        ``energy_kept`` is the smallest share of the combined ΔW's energy that a layer keeps.

    Raises:
        AdapterError: One cannot be read, they are of different bases, or they cannot be combined.
        OutputError: ``out`` cannot be written.
    """
    adapters = read_adapters(names, allow_other_base=allow_other_base)
    named = {adapter.name: adapter.config for adapter in adapters}
    check_terms(named, [adapter.name for adapter in adapters], weights)
    _check_parameters(adapters)
    largest = max(layer.rank for adapter in adapters for layer in adapter.layers.values())
    biased = any(config.lora_bias for config in named.values())
    tensors, ranks, kept = _base_weights(adapters), dict[str, int](), list[float]()
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        parts = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if name in adapter.layers]
        made = combine_layer([_update(adapter.layers[name], w) for adapter, w in parts], method, largest)
        tensors |= _stored(made, factors(parts[0][0].layers[name], dict(parts[0][0].tensors)), biased)
        ranks[name] = made.rank
        kept.append(made.energy_kept)
    log_energy(kept, method)
    parameters = {name for name in ranks if _is_parameter(adapters, name)}
    config = combined_settings(list(named.values()), ranks, sorted(ranks.keys() - parameters), sorted(parameters))
    made_from = {"method": method.name, "adapters": [str(name) for name in names], "weights": list(weights)}
    figures = {"energy_kept": min(kept), "density": method.pruning.density if method.prunes else None}
    notes = {key: adapters[0].notes[key] for key in _KEPT if key in adapters[0].notes}
    combined = {**made_from, "adapters": [Path(name).name for name in names], **figures}  # no paths of this machine
    write_made(out, names[0], config, tensors, {**notes, "combined": combined})
    count = sum(tensor.numel() for key, tensor in tensors.items() if ".lora_" in key)
    return {"path": str(out), **made_from, "ranks": ranks, "parameters": count, "energy_kept": min(kept)}


def _update(layer: SavedLayer, weight: float) -> LayerUpdate:
    """Return a layer's update; formats of 16 bits become fp32, so that the sum is not rounded to them."""
    a, b, bias = (layer.tensors.get(name) for name in ("A", "B", "bias"))
    assert a is not None and b is not None
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    own = bias.to(dtype) if bias is not None else None
    return LayerUpdate(weight, layer.scaling, layer.rank, a.to(dtype), b.to(dtype), own)


def _stored(made: CombinedLayer, like: dict[str, Tensor], biased: bool) -> dict[str, Tensor]:
    """Return the tensors of a layer by their keys in the file.

    Args:
        made: The combined layer.
        like: A and B of one of the adapters.
        biased: Whether the settings give each B a bias; it is zero where no adapter has one. Embeddings have none.
    """
    key_a, key_b = like
    tensors = {key_a: made.A, key_b: made.B}
    if biased and key_b.endswith("lora_B.weight"):
        bias = made.B.new_zeros(len(made.B)) if made.bias is None else made.bias
        tensors[key_b.removesuffix("weight") + "bias"] = bias
    return tensors


def _check_parameters(adapters: Sequence[AdapterFiles]) -> None:
    """Check that adapters of bare parameters adapt the same ones: a file names only the modules that own them.

    Raises:
        AdapterError: They do not.
    """
    keys = {tuple(sorted(layer.name for layer in adapter.layers.values())) for adapter in adapters}
    targets = {tuple(sorted(adapter.config.target_parameters or ())) for adapter in adapters}
    if any(targets) and (len(keys) > 1 or len(targets) > 1):
        raise AdapterError(
            "the adapters have different target_parameters, whose names a file does not hold",
            "load them on the base and call add_weighted_adapter",
        )


def _is_parameter(adapters: Sequence[AdapterFiles], name: str) -> bool:
    """Whether a layer is a bare parameter, named as the settings name it."""
    wanted = [key for adapter in adapters for key in adapter.config.target_parameters or ()]
    return any(name == key or name.endswith(f".{key}") for key in wanted)


def _base_weights(adapters: Sequence[AdapterFiles]) -> dict[str, Tensor]:
    """Return the base's own weights in the files, of adapted embeddings and heads.

    Raises:
        AdapterError: They differ, or a file has other tensors beside A and B.
    """
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        _, others = saved_layers(adapter.tensors, adapter.config)
        for name in others:
            key = PREFIX + name if PREFIX + name in adapter.tensors else name
            tensor = adapter.tensors[key]
            if not name.endswith(".base_layer.weight") or not torch.equal(found.setdefault(key, tensor), tensor):
                raise AdapterError(
                    f"adapter {adapter.name!r} has its own {name}, which cannot be combined",
                    "merge the adapters into the base one after the other",
                )
    return found
