"""Descriptions of micro-batches for messages: their samples, and where these are in the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: Characters of a sample's text that a description shows, and token ids where there is no tokenizer.
TEXT, IDS = 80, 16


def describe_batch(
    inputs: Mapping[str, Any], decode: Callable[[Any], str] | None, places: Sequence[str] | None = None
) -> str:
    """Describe each sample of a micro-batch in a line, so that a person finds it in the data.

    Args:
        inputs: The micro-batch.
        decode: Turns token ids into text; None: ids are shown.
        places: Where each sample is in the data; None: unknown.
    """
    ids = inputs.get("input_ids")
    if not torch.is_tensor(ids) or ids.dim() != 2:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items() if torch.is_tensor(value))
        return "\n".join([*(f"  {place}" for place in places or ()), f"  {shapes}"])
    mask = inputs.get("attention_mask")
    lines = []
    for row, tokens in enumerate(ids):
        real = tokens[mask[row].bool()] if torch.is_tensor(mask) and mask.shape == ids.shape else tokens
        text = repr(decode(real)[:TEXT]) if decode else f"token ids {real[:IDS].tolist()}"
        place = f", {places[row]}" if places and row < len(places) else ""
        lines.append(f"  sample {row}{place}: {len(real)} tokens, {text}")
    return "\n".join(lines)
