"""Choice of the forward pass for a model: over pages where its cache is plain keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from lorakeet.eval_mode import evaluating
from lorakeet.serve.engine.forward import Forward, PlainForward
from lorakeet.serve.engine.pages import Pages


def choose_forward(
    model: Any, page_tokens: int, cache_bytes: int, make: Callable[[Any, Pages], Forward] | None = None
) -> Forward:
    """Return the forward pass for a causal model.

    Args:
        model: The model, without adapters that act.
        page_tokens: Tokens of a page.
        cache_bytes: Bytes of all pages.
        make: Function of the model and the pool that makes the pass; None: the plain one.
    """
    pages = make_pages(model, page_tokens, cache_bytes)
    assert pages is not None
    return (make or PlainForward)(model, pages)


@torch.inference_mode()
def make_pages(model: Any, page_tokens: int, cache_bytes: int) -> Pages | None:
    """Return a pool for the model's keys and values; None where its cache is something else.

    One token is computed to see what the model stores: sliding windows, states, and heads of several sizes are no pages.
    """
    cache, device = DynamicCache(config=model.config), next(model.parameters()).device
    with evaluating(model):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
    layers: list[Any] = list(cache.layers)
    if not layers or any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in layers):
        return None
    shapes = {(tensor.shape, tensor.dtype) for layer in layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1:
        return None
    [(shape, dtype)] = shapes
    _, heads, _, dim = shape
    page_bytes = 2 * len(layers) * heads * page_tokens * dim * dtype.itemsize
    return Pages(len(layers), max(1, cache_bytes // page_bytes), heads, page_tokens, dim, dtype, device)
