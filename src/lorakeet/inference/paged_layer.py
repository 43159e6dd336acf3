"""Decoder layers of ``generate`` in the loops of the server: a text has the same bits alone, in a batch, and served.

The loops read keys and values from pages. Here each text of a batch is one page, which begins with its first real token and
grows with it. transformers' cache is filled as ever, so beams and cropped caches stay possible: pages are filled again
where the cache is not what the last step left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lorakeet.kernels import decoder_step, paged
from lorakeet.kernels.cpu import abi, bindings, gemm
from lorakeet.kernels.decoder_step import Update
from lorakeet.kernels.int8.format import outlier_columns, split_scale
from lorakeet.kernels.paged import PagedLayers, Rows, UpdateTable
from lorakeet.quant.protocol import is_quantized

#: Share by which pages are longer than needed when they are made, so that they are not made for every token.
_GROWTH = 1.25


class Shared:
    """Facts of a forward pass that its layers share.

    Attributes:
        rounded: Whether the last layer ran in the loops, so that norm and head do too.
    """

    def __init__(self) -> None:
        self.rounded = False
        self._mask: Tensor | None = None
        self._pads: list[int] | None = None

    def pads(self, mask: Tensor | None, n: int, count: int, length: int) -> list[int] | None:
        """Return the padding on the left of each text; None for a mask that is not causal behind such padding.

        Args:
            mask: Attention mask, bool [n or 1, 1, count, length], or None.
            n: Texts.
            count: Tokens of each in this pass.
            length: Tokens of each, with those that are cached.
        """
        if mask is None:
            return [0] * n if count in (1, length) else None
        if mask is not self._mask:
            self._mask, self._pads = mask, _left_padding(mask, count, length)
        pads = self._pads
        return pads * n if pads is not None and len(pads) == 1 else pads


def _left_padding(mask: Tensor, count: int, length: int) -> list[int] | None:
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, count, length):
        return None
    pads = length - mask[:, 0, -1].sum(-1)
    columns, rows = torch.arange(length), torch.arange(length - count, length).unsqueeze(1)
    causal = (columns <= rows) & (columns >= pads.view(-1, 1, 1))
    real = rows >= pads.view(-1, 1, 1)  # what padding attends to does not matter
    return pads.tolist() if bool(((mask[:, 0] == causal) | ~real).all()) and bool((pads < length).all()) else None


class PagedLayer:
    """A decoder layer with its adapter, and the pages of the texts that run through it.

    Args:
        weights: q, k, v, o, gate, up and down, with their updates.
        layer: The same layer as the other loops read it.
    """

    def __init__(self, weights: list[decoder_step.LinearWeights], layer: decoder_step.Layer) -> None:
        self._layers = PagedLayers([layer])
        updates = [
            None if one.a is None or one.b is None else Update(one.a, one.b, one.scaling, one.output) for one in weights
        ]
        self._updates = UpdateTable([updates])
        self._pages = torch.empty(2, 0, 0, 0, 0)  # [keys and values, texts, heads, tokens, dim]
        self._cached: Tensor | None = None  # keys as the cache has them if the pages hold the same
        self._pads: list[int] = []

    def step(self, x: Tensor, places: tuple[Tensor, Tensor], pads: list[int], past: DynamicCache, index: int) -> Tensor:
        """Compute the layer, and give the cache the new keys and values.

        Args:
            x: fp32 [n, count, hidden].
            places: Cosine and sine, fp32 [n or 1, count, dim].
            pads: Padding on the left of each text.
            past: The key-value cache.
            index: Number of the layer in it.

        Returns:
            fp32 [n, count, hidden]; padding is as in x.
        """
        n, count, hidden = x.shape
        cached = cache_of(past, index)
        assert cached is not None
        before = cached.get_seq_length()
        self._prepare(cached, pads, before, count)
        real = [(i, t) for i in range(n) for t in range(count) if before + t >= pads[i]]
        chosen = None if len(real) == n * count else torch.tensor([i * count + t for i, t in real])
        rows = Rows(
            [[i] for i in range(n)],
            [i for i, _ in real],
            [before + t - pads[i] for i, t in real],
            [self._updates] * len(real),
        )
        given = [x, *(place.expand(n, count, -1) for place in places)]
        flat = [one.reshape(n * count, -1) for one in given]
        picked = [one.contiguous() if chosen is None else one[chosen] for one in flat]
        keys, values = self._pages.unsqueeze(1)
        h = self._layers.run(picked[0], rows, keys, values, *picked[1:])
        made = h if chosen is None else flat[0].clone().index_copy_(0, chosen, h)
        self._cached, _ = past.update(*self._new(pads, before, count), index)
        self._pads = pads
        return made.view(n, count, hidden)

    def _prepare(self, cached: DynamicLayer, pads: list[int], before: int, count: int) -> None:
        """Make pages that hold what the cache holds, with room for ``count`` tokens."""
        room = self._pages.shape[3]
        same = before > 0 and cached.keys is self._cached and pads == self._pads
        if same and before + count <= room:
            return
        size = int((before + count) * _GROWTH) // abi.PAGE_STEP * abi.PAGE_STEP + abi.PAGE_STEP
        pages = torch.zeros(2, len(pads), self._layers.kv_heads, size, self._layers.dim)
        for i, pad in enumerate(pads):
            for part, tensor in zip(pages, (cached.keys, cached.values) if before > pad else (), strict=False):
                part[i, :, : before - pad] = tensor[i, :, pad:]  # type: ignore[index]
        self._pages = pages

    def _new(self, pads: list[int], before: int, count: int) -> list[Tensor]:
        """Return the keys and values of the last tokens, [n, heads, count, dim] each; zeros for padding."""
        if not any(pads):
            return list(self._pages[:, :, :, before : before + count])
        made = self._pages.new_zeros(*self._pages.shape[:3], count, self._pages.shape[4])
        for i, pad in enumerate(pads):
            first = max(pad - before, 0)
            made[:, i, :, first:] = self._pages[:, i, :, before + first - pad : before + count - pad]
        return list(made)


def _update(weights: decoder_step.LinearWeights) -> Update | None:
    if weights.a is None or weights.b is None:
        return None
    return Update(weights.a, weights.b, weights.scaling, weights.output)


def has_pages(dim: int) -> bool:
    """Whether the loops over pages compute layers with heads of this width."""
    return dim % abi.HEAD_STEP == 0 and paged.is_available()


def cache_of(past: Any, index: int) -> DynamicLayer | None:
    """Return the part of a cache that belongs to a layer, if it is a plain growing one in fp32 on the CPU."""
    if type(past) is not DynamicCache:
        return None
    while len(past.layers) <= index:
        past.layers.append(DynamicLayer())
    found = past.layers[index]
    if type(found) is not DynamicLayer or (found.get_seq_length() and found.keys.dtype != torch.float32):  # type: ignore[union-attr]
        return None
    return found


class QuickNorm:
    """Forward of the last norm, in C behind layers that ran in the loops."""

    def __init__(self, module: Any, shared: Shared) -> None:
        self.module, self.own, self.shared = module, module.forward, shared

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.module.weight
        if not self.shared.rounded or is_hooked_around(self.module) or not bindings.supports(x, weight):
            return self.own(x)  # type: ignore[no-any-return]
        return bindings.rms_norm(x, weight, self.module.variance_epsilon, 0.0)[0]


class QuickHead:
    """Forward of the LM head: behind layers that ran in the loops it rounds activations as they do."""

    def __init__(self, module: Any, shared: Shared) -> None:
        self.module, self.own, self.shared = module, module.forward, shared

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        weights = self.module.decoder_weights() if is_quantized(self.module) else None
        if not self.shared.rounded or weights is None or is_hooked_around(self.module) or not bindings.supports(x):
            return self.own(x)  # type: ignore[no-any-return]
        if weights.packed or outlier_columns(weights.weight, weights.scale) is not None:
            return self.own(x)  # type: ignore[no-any-return]
        rows, (row_scale, column_scale) = x.reshape(-1, x.shape[-1]), split_scale(weights.weight, weights.scale)
        h = gemm.gemv_w8a16(rows, weights.weight, row_scale, column_scale, weights.bias)
        return h.view(*x.shape[:-1], -1)


def is_hooked_around(module: Any) -> bool:
    """Whether a module has hooks, apart from the forward that stands in for its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
