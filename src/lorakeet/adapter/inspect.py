"""Inspect an adapter: its settings, layers, size, the norm of its update, and the tools that can load it.

Reads the adapter's files only. No base model is needed, and no ΔW is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakeet.adapter.compatibility import exports, readers
from lorakeet.adapter.serialization import read_notes, read_tensors
from lorakeet.adapter.tensor_checks import is_untrained, nonfinite_error
from lorakeet.adapter.tensor_names import PREFIX, SHARED
from lorakeet.lora.algebra.blocks import split_blocks
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.targeting import Target, matches, target_of

#: Names of A, B and B's bias in the file, relative to the layer -> their names here.
_MATRICES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}


@dataclass(frozen=True)
class SavedLayer:
    """The tensors of one layer and its settings.

    Attributes:
        name: The layer's name in the file.
        tensors: ``A`` [r, in], ``B`` [out, r], ``bias`` [out] and the variant's own, as far as the file has them.
        target: Rank and α by the settings.
        config: The adapter's settings.
    """

    name: str
    tensors: Mapping[str, Tensor]
    target: Target
    config: PeftConfig

    @property
    def is_whole(self) -> bool:
        """Whether A and B are there and can be multiplied."""
        a, b = self.tensors.get("A"), self.tensors.get("B")
        if any(name not in self.tensors for name in self.config.variant.tensor_names("")):
            return False
        if a is None or b is None or a.ndim != b.ndim or a.ndim < 2 or not a.numel() or not b.numel():
            return False
        a, b = self.pair()
        return a.shape[0] == b.shape[1] if a.ndim == 2 else a.shape[0] % b.shape[1] == 0  # a convolution has groups

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A and B as they are multiplied."""
        return self.config.variant.saved_pair(self.kind, self.tensors, self.config)

    @property
    def kind(self) -> str:
        """The last part of the layer's name."""
        return self.name.replace(".base_layer", "").rpartition(".")[2]

    @property
    def rank(self) -> int:
        """The rank: of stacked experts, of each."""
        return self.target.r if self.stacks_experts else len(self.tensors["A"])

    @property
    def scaling(self) -> float:
        """s in h = W₀x + s·B·A·x."""
        return self.config.scaling(self.rank, self.target.alpha)

    @property
    def stacks_experts(self) -> bool:
        """Whether A and B hold the matrices of several experts."""
        return bool(self.config.target_parameters) and len(self.tensors["A"]) % self.target.r == 0

    def error(self) -> str | None:
        """Return why the layer cannot be loaded; None if it can."""
        pair = ("A", "B") if self.config.variant.stores_pair else ()
        expected = (*pair, *self.config.variant.tensor_names(""))
        if missing := [name for name in expected if name not in self.tensors]:
            return f"{self.name} has no {' and no '.join(missing)}"
        if not pair:
            return None
        shapes = f"A {list(self.tensors['A'].shape)} and B {list(self.tensors['B'].shape)}"
        if not self.is_whole:
            return f"{self.name} has {shapes}, which cannot be multiplied"
        if len(self.tensors["A"]) == self.target.r or self.stacks_experts:
            return None
        return f"{self.name} has {shapes}, but the settings have rank {self.target.r}"

    def summary(self) -> dict[str, Any]:
        """Return the layer's entry in :func:`inspect_adapter`; the layer must be whole."""
        a, b = self.pair()
        norm = math.hypot(*(update_norm(*block, self.scaling) for block in split_blocks(a, b, self.rank)))
        return {
            "name": self.name,
            "kind": self.kind,
            "in": a.shape[1],
            "out": b.shape[0],
            "r": self.rank,
            "alpha": self.target.alpha,
            "scaling": self.scaling,
            "parameters": sum(tensor.numel() for tensor in self.tensors.values()),
            "update_norm": norm if math.isfinite(norm) else None,
            "dead": not (bool(a.any()) and bool(b.any())),
        }


def inspect_adapter(name: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> dict[str, Any]:
    """Return what the files of the adapter ``name`` (folder or hub id) contain, as values for JSON.

    - ``adapter``, ``base_model``, ``architecture``, ``settings``: names and settings.
    - ``parameters``, ``bytes``, ``dtypes`` (parameters by dtype): the size.
    - ``layers``: one entry each; ``update_norm`` is ‖s·BA‖_F, None where it is not finite.
    - ``kinds``: the same, summed up by the last part of the layer's name.
    - ``trained_whole``: names of the other tensors.
    - ``learned``, ``dead_layers``, ``finite``, ``problems``: whether it is trained, and what keeps it from being loaded.
    - ``readers``: the tools that can load it.
    - ``exports``: the tools that ``lorakeet export`` can write it for.
    - ``lorakeet``: the content of our own file.

    Raises:
        AdapterError: no such adapter; a pickle; a damaged file.
        ConfigError: its settings are not valid.
    """
    source: dict[str, Any] = {"revision": revision, "subfolder": subfolder}
    config = PeftConfig.from_pretrained(name, **source)
    tensors = read_tensors(name, **source)
    notes = read_notes(name, **source)
    layers, others = saved_layers(tensors, config)
    summaries = [layer.summary() for layer in layers if layer.is_whole]
    nonfinite, trained = nonfinite_error(tensors), not is_untrained(tensors)
    errors = [error for layer in layers if (error := layer.error())] + ([nonfinite] if nonfinite else [])
    refused = errors + ([] if trained else ["it is untrained"])
    architecture = ((notes.get("base") or {}).get("fingerprint") or {}).get("architecture")
    ranks = {layer["r"] for layer in summaries}
    own_settings = (*type(config).model_fields, *config.variant_settings)
    return {
        "adapter": str(name),
        "base_model": config.base_model_name_or_path,
        "architecture": architecture,
        "settings": {key: value for key, value in config.to_dict().items() if key in own_settings},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": _dtypes(tensors),
        "layers": summaries,
        "kinds": _by_kind(summaries),
        "trained_whole": others,
        "learned": trained,
        "dead_layers": [layer["name"] for layer in summaries if layer["dead"]],
        "finite": nonfinite is None,
        "problems": errors,
        "readers": readers(config, tensors, ranks, base=architecture, problems=refused),
        "exports": exports(config, tensors, ranks, base=architecture),
        "lorakeet": notes,
    }


def update_norm(lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """Compute ‖s·BA‖_F = s·√tr((BᵀB)(AAᵀ)) of A [r, in] and B [out, r]: two r×r products in fp64, never [out, in]."""
    a, b = lora_A.double(), lora_B.double()
    return scaling * math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def saved_layers(tensors: Mapping[str, Tensor], config: PeftConfig) -> tuple[list[SavedLayer], list[str]]:
    """Return the adapted layers by name, and the names of all other tensors."""
    known = _MATRICES | {name: name for name in config.variant.tensor_names("")}
    found: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        layer, mark, rest = key.removeprefix(PREFIX).rpartition(".lora_")
        if mark and f"lora_{rest}" in known:
            found.setdefault(layer, {})[known[f"lora_{rest}"]] = tensor
        elif key.startswith(PREFIX) or not key.startswith(SHARED):
            others.append(key.removeprefix(PREFIX))
    targets = _targets(found, config)
    return [SavedLayer(name, found[name], targets[name], config) for name in sorted(found)], sorted(others)


def _targets(found: Mapping[str, Mapping[str, Tensor]], config: PeftConfig) -> dict[str, Target]:
    """Return the rank and α that the settings give each layer.

    The file does not name an adapted parameter, only the module that owns it, once for each of its parameters. They are
    distinguished by their ranks, which must leave the same number of experts.
    """
    targets: dict[str, Target] = {}
    owners: dict[str, list[str]] = {}
    for name in found:
        if not config.target_parameters or matches(name, config.target_modules or []):
            targets[name] = target_of(name, config)
        else:
            owners.setdefault(name.replace(".base_layer", ""), []).append(name)
    for owner, names in owners.items():
        full = [(f"{owner}.{key.rpartition('.')[2]}", key) for key in config.target_parameters or ()]
        choices = [target_of(name, config) for name, key in full if matches(name, [key])]
        rows = [len(found[name].get("A", ())) for name in names]
        orders = list(permutations(choices, len(names))) or [tuple(target_of(name, config) for name in names)]
        targets |= zip(names, next((o for o in orders if _same_experts(rows, o)), orders[0]), strict=True)
    return targets


def _same_experts(rows: list[int], order: tuple[Target, ...]) -> bool:
    """Whether the rows of each A are the same multiple (the number of experts) of the targets' ranks."""
    divisible = all(n % target.r == 0 for n, target in zip(rows, order, strict=True))
    return divisible and len({n // target.r for n, target in zip(rows, order, strict=True)}) == 1


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    return counts


def _by_kind(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarize the layers by the last part of their names, in the order of these."""
    summaries = []
    for kind in sorted({layer["kind"] for layer in layers}):
        same = [layer for layer in layers if layer["kind"] == kind]
        norms = [layer["update_norm"] for layer in same if layer["update_norm"] is not None]
        summaries.append(
            {
                "kind": kind,
                "layers": len(same),
                "r": sorted({layer["r"] for layer in same}),
                "scaling": sorted({layer["scaling"] for layer in same}),
                "shapes": sorted({f"{layer['in']}→{layer['out']}" for layer in same}),
                "parameters": sum(layer["parameters"] for layer in same),
                "update_norm_mean": sum(norms) / len(norms) if norms else None,
                "update_norm_min": min(norms, default=None),
                "update_norm_max": max(norms, default=None),
                "dead": sum(layer["dead"] for layer in same),
            }
        )
    return summaries
