"""Which base an adapter belongs to: its shapes and a few of its numbers.

Names lie (a folder is renamed, a copy is fine-tuned on); shapes and values do not. The values are compared with a tolerance,
so that the same base in bf16 or 8 bits still is the same base.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.quant.protocol import quantized_layers, weight_rows

#: Largest accepted relative difference (L2) of the sampled values: above rounding to bf16 (0.4 %) and int8 (1 %).
TOLERANCE = 0.02
_VALUES = 16
_NORMS = 6


def fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """The base's architecture, a hash of its parameter shapes, and sampled values; None on the meta device.

    Adapter parameters do not count, nor does the number of rows of the embeddings (a vocabulary may be resized).
    """
    own = {
        re.sub(r"\.(base_layer|original_module)\.", ".", name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not re.search(r"\.(lora_\w+|modules_to_save)\.", name) and name.endswith((".weight", ".bias"))
    }
    if not own or any(parameter.is_meta for parameter in own.values()):
        return None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    rows = embedding.weight.shape[0] if embedding is not None else -1
    turned = {
        f"{name}.weight".replace(".base_layer.", ".")
        for name, module in model.named_modules()
        if getattr(module, "transposed", False)
    }
    shapes = sorted(
        f"{name}:{['rows' if n == rows else n for n in (p.shape[::-1] if name in turned else p.shape)]}"
        for name, p in own.items()
    )
    rounded = {
        f"{name}.weight".replace(".base_layer.", ".").replace(".original_module.", "."): layer
        for name, layer in quantized_layers(model)
    }
    matrices = [
        name for name, p in sorted(own.items()) if p.ndim >= 2 and (p.is_floating_point() or p.shape[0] == rows)
    ]
    # weights of norms; a bias may have been trained with the adapter
    vectors = [
        name for name, p in sorted(own.items()) if p.ndim == 1 and p.is_floating_point() and name.endswith("weight")
    ]
    picked = [name for name in matrices if own[name].shape[0] == rows][:1] or matrices[:1]
    picked += vectors[:: max(1, len(vectors) // _NORMS)][:_NORMS]
    return {
        "architecture": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "shapes": hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16],
        "values": {name: _sample(own[name], rounded.get(name)) for name in picked},
    }


def _sample(parameter: Tensor, rounded: nn.Module | None) -> list[float]:
    """16 values from the first rows, spread over the columns; of a rounded weight those that it stands for."""
    with torch.no_grad():
        first = torch.arange(min(64, len(parameter)), device=parameter.device)
        rows = parameter[first] if rounded is None else weight_rows(rounded, first)
        line = parameter if parameter.ndim == 1 else rows.reshape(len(first), -1).diagonal()
        step = max(1, line.numel() // _VALUES)
        return [float(f"{value:.6g}") for value in line[::step][:_VALUES].float().tolist()]


def mismatch(wanted: dict[str, Any], model: nn.Module) -> str | None:
    """Why ``model`` is not the base that ``wanted`` was taken of; None if it is (or cannot be told)."""
    found = fingerprint(model)
    if found is None:
        return None
    if wanted["architecture"] != found["architecture"]:
        return f"its architecture is {found['architecture']!r}, expected {wanted['architecture']!r}"
    for name, values in wanted["values"].items():
        mine = found["values"].get(name)
        if mine is None or len(mine) != len(values):
            return f"it has no {name} of the expected shape"
        a, b = torch.tensor(values), torch.tensor(mine)
        if float((a - b).norm()) > TOLERANCE * float(a.norm()) + 1e-6:
            return f"its weights differ (for example {name})"
    return None if wanted["shapes"] == found["shapes"] else "its parameters have other names or shapes"
