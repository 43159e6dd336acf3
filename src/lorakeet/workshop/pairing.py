"""Adapters of one base, read from their files, and their layers by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.adapter.fingerprint import TOLERANCE
from lorakeet.adapter.inspect import SavedLayer
from lorakeet.adapter.serialization import read_notes
from lorakeet.errors import AdapterError
from lorakeet.lora.config import PeftConfig
from lorakeet.rank.report import read_layers


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its files have it.

    Attributes:
        name: Folder or hub id.
        config: Its settings.
        tensors: Its tensors by their keys in the file.
        layers: Its layers of A and B, by their names in the base.
        notes: The contents of its ``lorakeet.json``.
    """

    name: str
    config: PeftConfig
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, SavedLayer]
    notes: Mapping[str, Any]


def read_adapters(names: Sequence[str | Path], *, allow_other_base: bool = False) -> list[AdapterFiles]:
    """Read adapters of the same base.

    Args:
        names: Folders or hub ids.
        allow_other_base: Accept adapters of different bases.

    Raises:
        AdapterError: One cannot be read, or they were trained on different bases.
    """
    found = []
    for name in names:
        config, tensors, layers = read_layers(name)
        by_name = {layer.target.name.replace(".base_layer", ""): layer for layer in layers}
        found.append(AdapterFiles(str(name), config, tensors, by_name, read_notes(name)))
    for other in found[1:] if not allow_other_base else ():
        if difference := _base_difference(found[0], other):
            raise AdapterError(
                f"adapters {found[0].name!r} and {other.name!r} were trained on different bases: {difference}",
                "take adapters of one base; --allow-other-base accepts these",
            )
    return found


def _base_difference(one: AdapterFiles, other: AdapterFiles) -> str | None:
    """Return how the fingerprints of two bases differ; None if they do not, or one is not noted."""
    first, second = ((adapter.notes.get("base") or {}).get("fingerprint") for adapter in (one, other))
    if not first or not second:
        return None
    for what in ("architecture", "shapes"):
        if first[what] != second[what]:
            return f"{what} {first[what]!r} and {second[what]!r}"
    for name in first["values"].keys() & second["values"].keys():
        a, b = (torch.tensor(side["values"][name]) for side in (first, second))
        if len(a) != len(b) or float((a - b).norm()) > 2 * TOLERANCE * float(a.norm()) + 1e-6:
            return f"weights differ, for example {name}"
    return None
