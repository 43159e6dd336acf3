"""The fingerprint of a base model: its parameters' shapes and a few of their values.

A name is no proof: folders are renamed, copies are trained further. Values are compared with a tolerance, so the same base in
bf16 or 8 bits has the same fingerprint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.facts.sharded import is_sharded
from lorakeet.facts.vocabulary import embedding_rows
from lorakeet.lora.initialization.taken_part import taken_parts, whole_weight
from lorakeet.lora.interop.wrappers import canonical
from lorakeet.quant.protocol import QuantizedLayer, quantized_layers, weight_rows, weight_shape

#: Largest accepted relative difference (L2) of the sampled values: above rounding to bf16 (0.4 %) and int8 (1 %).
TOLERANCE = 0.02
#: Values sampled of a parameter, and rows of a matrix that they are taken from.
_VALUES, _ROWS = 16, 64
#: Norm weights that are sampled, spread over the depth of the model.
_NORMS = 6


@dataclass(frozen=True)
class _Base:
    """The base's own parameters in a model with or without adapters, by the names they have without.

    Attributes:
        parameters: Weights and biases; a quantized weight as it is stored.
        quantized: The layers of quantized weights, by the name of the weight.
        transposed: Names of weights whose shape counts the other way round.
        vocabulary: Rows of the input embedding; -1 without one.
        taken: LoRA layers whose adapters hold a part of the weight, by the name of the weight.
    """

    parameters: Mapping[str, Tensor]
    quantized: Mapping[str, QuantizedLayer]
    transposed: frozenset[str]
    vocabulary: int
    taken: Mapping[str, Any]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter; of a quantized weight [out, in]."""
        return {
            name: weight_shape(self.quantized[name]) if name in self.quantized else tuple(parameter.shape)
            for name, parameter in self.parameters.items()
        }

    def shapes_hash(self) -> str:
        """Hash all names and shapes; the number of tokens does not count, since a vocabulary may be resized."""
        lines = []
        for name, shape in self.shapes.items():
            ordered = shape[::-1] if name in self.transposed else shape
            lines.append(f"{name}:{['rows' if size == self.vocabulary else size for size in ordered]}")
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]

    def sampled_names(self) -> list[str]:
        """Choose the parameters to sample: the embedding (or another matrix), and norm weights of several layers.

        Biases are left out: they may be trained with the adapter.
        """
        floating = [name for name, parameter in sorted(self.parameters.items()) if parameter.is_floating_point()]
        dense = [name for name in floating if name not in self.quantized]
        embeddings = [name for name in sorted(self.parameters) if self._is_vocabulary(name)]
        matrices = [name for name in dense if len(self.shapes[name]) >= 2]
        norms = [name for name in dense if len(self.shapes[name]) == 1 and name.endswith("weight")]
        return (embeddings or matrices)[:1] + norms[:: max(1, len(norms) // _NORMS)][:_NORMS]

    def _is_vocabulary(self, name: str) -> bool:
        return len(self.shapes[name]) >= 2 and self.shapes[name][0] == self.vocabulary

    @torch.no_grad()
    def sample(self, name: str) -> list[float]:
        """Return 16 values from the first rows, spread over the columns; of a quantized weight the dequantized ones."""
        parameter = whole_weight(self.taken[name]) if name in self.taken else self.parameters[name]
        line = parameter
        if len(self.shapes[name]) > 1:
            first = torch.arange(min(_ROWS, self.shapes[name][0]), device=parameter.device)
            stored = name in self.quantized and name not in self.taken
            rows = weight_rows(self.quantized[name], first) if stored else parameter[first]
            line = rows.reshape(len(first), -1).diagonal()
        step = max(1, line.numel() // _VALUES)
        return [float(f"{value:.6g}") for value in line[::step][:_VALUES].float().tolist()]


def base_name(name: str) -> str:
    """Return the name that a parameter has in the model without adapters."""
    return re.sub(r"\.(base_layer|original_module)\.", ".", canonical(name))


def _base_of(model: nn.Module, state: Mapping[str, Tensor]) -> _Base:
    parameters = {
        base_name(name): state.get(name, parameter) if is_sharded(parameter) else parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not re.search(r"\.(lora_\w+|modules_to_save)\.", name) and name.endswith((".weight", ".bias"))
    }
    quantized = {base_name(f"{name}.weight"): layer for name, layer in quantized_layers(model)}
    transposed = {
        base_name(f"{name}.weight") for name, module in model.named_modules() if getattr(module, "transposed", False)
    }
    taken = {base_name(f"{name}.weight"): layer for name, layer in model.named_modules() if taken_parts(layer)}
    rows = embedding_rows(model)
    return _Base(parameters, quantized, frozenset(transposed), -1 if rows is None else rows, taken)


def fingerprint(
    model: nn.Module, state: Mapping[str, Tensor] | None = None, *, leave_out: Iterable[str] = ()
) -> dict[str, Any] | None:
    """Return the base's architecture, a hash of its parameters' shapes, and sampled values; None where values are not here.

    Adapter parameters do not count, nor does the number of tokens (a vocabulary may be resized).

    Args:
        model: The base, with adapters or without.
        state: Gathered tensors of a sharded model; left out: the model's own.
        leave_out: Names of parameters whose values are trained, so the base has other ones.
    """
    base = _base_of(model, state or {})
    trained = {id(base.parameters[name]) for name in map(base_name, leave_out) if name in base.parameters}
    sampled = [
        base.parameters[name] for name in base.sampled_names()
    ]  # of a sharded base, norms and embedding may be whole
    if not base.parameters or any(p.is_meta or is_sharded(p) for p in sampled):
        return None
    return {
        "architecture": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "shapes": base.shapes_hash(),
        "values": {
            name: base.sample(name) for name in base.sampled_names() if id(base.parameters[name]) not in trained
        },
    }


def sampled_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose values a fingerprint has; the model may have no weights."""
    return _base_of(model, {}).sampled_names()


def mismatch(
    expected: dict[str, Any], model: nn.Module, current: Callable[[str], str] = lambda name: name
) -> str | None:
    """Return why ``model`` is not the base of a fingerprint; None if it is (or has no fingerprint).

    Args:
        expected: The fingerprint.
        model: The base, with adapters or without.
        current: Function of a parameter's name in the fingerprint: its name in ``model``, after renamings in transformers.
    """
    found = fingerprint(model)
    if found is None:
        return None
    if expected["architecture"] != found["architecture"]:
        return f"its architecture is {found['architecture']!r}, expected {expected['architecture']!r}"
    base, renamed = _base_of(model, {}), False
    for name, values in expected["values"].items():
        today = current(name)
        renamed |= today != name
        own = base.sample(today) if today in base.parameters else []
        if len(own) != len(values):
            return f"it has no {name} of the expected shape"
        if not _are_near(values, own):
            return f"its weights differ (for example {name})"
    return None if renamed or expected["shapes"] == found["shapes"] else "its parameters have other names or shapes"


def agree(expected: dict[str, Any], found: dict[str, Any] | None) -> bool:
    """Whether two fingerprints are of one base; if not, it may still be one whose parameters were renamed.

    Args:
        expected: The fingerprint of an adapter's base.
        found: That of a base that was fingerprinted before; None: it has no values.
    """
    if found is None or any(expected[key] != found[key] for key in ("architecture", "shapes")):
        return False
    own = found["values"]
    return all(name in own and _are_near(values, own[name]) for name, values in expected["values"].items())


def _are_near(expected: list[float], found: list[float]) -> bool:
    a, b = torch.tensor(expected), torch.tensor(found)
    return a.shape == b.shape and float((a - b).norm()) <= TOLERANCE * float(a.norm()) + 1e-6
