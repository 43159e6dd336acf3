"""Choice of the forward pass for a model, held against the model's own forward before it serves.

A model whose cache is plain keys and values runs over pages, in batches. Any other runs row by row, over its own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lorakeet.errors import BaseModelError
from lorakeet.eval_mode import evaluating
from lorakeet.facts.vocabulary import embedding_rows
from lorakeet.log import warn
from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.engine import forward as passes
from lorakeet.serve.engine.forward import Forward, Piece, PlainForward
from lorakeet.serve.engine.own_cache import OwnCacheForward

#: Largest accepted distance (L2) between the logits of two ways, as a share of the logits' own size without their mean.
#: Products in 8 bits of one token and of several round differently; a wrong mask or position is off by more than the size.
_NEAR = 0.1
#: Tokens of two texts, and how many of them are stored before the step in which both run together.
_TRIAL = ((7, 5), (4, 3))

Make = Callable[[Any, Pages], Forward]


@torch.inference_mode()
def choose_forward(model: Any, page_tokens: int, cache_bytes: int, make: Make | None = None) -> Forward:
    """Return the first forward pass that computes what the model does; one with a record of that is not compared again.

    Args:
        model: The model, without adapters that act.
        page_tokens: Tokens of a page.
        cache_bytes: Bytes of all pages.
        make: Function of the model and the pool that makes the pass; None: the plain one.

    Raises:
        BaseModelError: There is none.
    """
    if model.config.is_encoder_decoder:
        raise BaseModelError(
            f"{model.config.model_type} is an encoder-decoder, expected a model that continues its prompt",
            "lorakeet generate runs it",
        )
    with evaluating(model):
        expected: list[Tensor] = []
        for candidate in _candidates(model, page_tokens, cache_bytes, make):
            agreement = getattr(candidate, "agreement", None)
            if agreement is not None and agreement.is_noted:
                return candidate
            expected = expected or [model(input_ids=ids).logits[0, -1].float() for ids in _texts(model)]
            if _agrees(candidate, _texts(model), expected):
                if agreement is not None:
                    agreement.note()
                return candidate
    raise BaseModelError(
        f"{model.config.model_type} answers otherwise with a cache than without, so it cannot be served",
        "lorakeet generate runs it",
    )


def _candidates(model: Any, page_tokens: int, cache_bytes: int, make: Make | None) -> Iterator[Forward]:
    pages = make_pages(model, page_tokens, cache_bytes)
    if pages is not None:
        yield (make or PlainForward)(model, pages)
        yield PlainForward(model, pages)
        yield PlainForward(model, pages, batched=False)
    warn(
        f"{model.config.model_type} keeps no plain keys and values: its requests run one by one, without a prefix cache"
    )
    yield OwnCacheForward(model)


def make_pages(model: Any, page_tokens: int, cache_bytes: int) -> Pages | None:
    """Return a pool for the model's keys and values; None where its cache is something else.

    One token is computed to see what the model stores: sliding windows, states, and heads of several sizes are no pages.
    """
    if not model._supports_default_dynamic_cache() or "past_key_values" not in passes.forward_arguments(model):
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    model(input_ids=_texts(model)[0][:, :1], past_key_values=cache, use_cache=True)
    layers: list[Any] = list(cache.layers)
    if not all(layer.is_initialized for layer in layers):
        return None
    shapes = {(tensor.shape, tensor.dtype) for layer in layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1:
        return None
    [(shape, dtype)] = shapes
    _, heads, _, dim = shape
    page_bytes = 2 * len(layers) * heads * page_tokens * dim * dtype.itemsize
    count = max(1, cache_bytes // page_bytes)
    return Pages(len(layers), count, heads, page_tokens, dim, dtype, layers[0].keys.device)


def _texts(model: Any) -> list[Tensor]:
    """Return the ids of two short texts of different length, int64 [1, tokens]."""
    source = torch.Generator().manual_seed(0)
    most, device = min(embedding_rows(model) or 1, 1 << 15), next(model.parameters()).device
    return [torch.randint(most, (1, length), generator=source).to(device) for length, _ in _TRIAL]


def _agrees(forward: Forward, texts: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether the pass computes the expected logits of the last tokens, in pieces and in one batch with the other text."""
    pages, found = forward.pages, []
    rows = [
        passes.Sequence(pages=pages.take(pages.needed(text.shape[1])) if pages is not None else []) for text in texts
    ]
    try:
        left = [text[0].tolist() for text in texts]
        for row, ids, (_, first) in zip(rows, left, _TRIAL, strict=True):
            _run(forward, [Piece(row, ids[:first])])
            del ids[:first]
        last: list[Tensor | None] = [None] * len(rows)
        while any(left):
            live = [index for index, ids in enumerate(left) if ids]
            logits = _run(forward, [Piece(rows[index], [left[index].pop(0)]) for index in live])
            for index, line in zip(live, logits, strict=True):
                last[index] = line
        found = [line for line in last if line is not None]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError):
        return False  # an architecture that cannot be called so
    finally:
        for row in rows if pages is not None else ():
            for page in row.pages:
                pages.release(page)  # type: ignore[union-attr]
    return all(_is_near(one, other) for one, other in zip(found, expected, strict=True))


def _run(forward: Forward, pieces: Sequence[Piece]) -> Tensor:
    logits = forward.run(pieces)
    for piece in pieces:
        piece.sequence.length += len(piece.ids)
    return logits


def _is_near(found: Tensor, expected: Tensor) -> bool:
    distance, size = (found - expected).norm(), (expected - expected.mean()).norm()
    return bool(distance <= _NEAR * size + 1e-6)
