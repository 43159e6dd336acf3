"""One new token of each of a few texts through a decoder layer of the Llama family, in 8 bits: two calls of compiled loops.

    a = x + W_o·attention(rope(W_q·n), rope(W_k·n), W_v·n)        n  = norm(x)
    h = a + W_down·(silu(W_gate·m) ∘ W_up·m)                      m  = norm(a)

At batch one the products read a quarter of fp32's bytes, and what lies between them would cost more than they do if it were
some twenty modules of plain torch. The slow truth is the layer's own forward: :mod:`lorakeet.inference.fast_decode` compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.int8.linear import kept_columns, split_scale

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float


class LinearWeights(NamedTuple):
    """What a linear layer multiplies by: h = x·Wᵀ·diag(scale) + bias + scaling·x·Aᵀ·Bᵀ.

    Weight int8 [out, in]; scale fp32, what belongs to its bytes (:mod:`lorakeet.kernels.int8.linear`); bias fp32 [out];
    a fp32 [r, in] and b fp32 [out, r], or neither.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0


class Norm(NamedTuple):
    """x / √(mean(x²) + eps) ∘ weight; weight fp32 [width]."""

    weight: Tensor
    eps: float


class _Linear(ctypes.Structure):
    _fields_ = [
        *[(name, _POINTER) for name in ("weight", "scale", "columns", "places", "values", "bias", "a", "b")],
        *[(name, _SIZE) for name in ("out", "inner", "rank", "kept")],
        ("scaling", _FLOAT),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("eps", _FLOAT)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        *[(name, _Norm) for name in ("before", "after", "of_q", "of_k")],
        *[(name, _SIZE) for name in ("heads", "cached", "dim")],
        ("scaling", _FLOAT),
    ]


class Layer:
    """A decoder layer as the loops read it.

    Args:
        linears: q, k, v, o, gate, up, down.
        norms: before attention and after it; of each head of q and of k, or None and None.
        dim: width of a head.
        scaling: of the products of q and k.

    Raises:
        ValueError: the tensors do not fit each other, or the loops cannot read them.
    """

    def __init__(
        self, linears: Sequence[LinearWeights], norms: Sequence[Norm | None], dim: int, scaling: float
    ) -> None:
        shapes = [tuple(linear.weight.shape) for linear in linears]
        (wide, hidden), (narrow, _), (inner, _) = shapes[0], shapes[1], shapes[4]
        wanted = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide), *[(inner, hidden)] * 2]
        if shapes != [*wanted, (hidden, inner)] or wide % dim or narrow % dim or wide % max(narrow, 1) or dim % 2:
            raise ValueError(f"these weights are not those of a decoder layer with heads of {dim}: {shapes}")
        if not all(map(_readable, linears)) or not all(map(_as_wide, norms, (hidden, hidden, dim, dim))):
            raise ValueError("weights of a decoder layer that the loops cannot read")
        # What the loops read stays in memory, also where a parameter is given other values.
        self.held = [t.detach() for group in (*linears, *norms) if group for t in group if isinstance(t, Tensor)]
        self.hidden, self.wide, self.narrow, self.dim = hidden, wide, narrow, dim
        self.heads = wide // dim
        rank = max(0 if linear.a is None else len(linear.a) for linear in linears)
        self.room_before, self.room_after = hidden + rank, wide + hidden + 2 * inner + rank
        self.inner = _Layer(
            *map(_linear, linears),
            *(_Norm(None, 0) if norm is None else _Norm(norm.weight.data_ptr(), norm.eps) for norm in norms),
            *(self.heads, narrow // dim, dim),
            scaling,
        )
        self.at = ctypes.addressof(self.inner)


def _linear(factors: LinearWeights) -> _Linear:
    weight, scale, *others, _ = factors
    kept = kept_columns(weight, scale)
    given = (weight, *split_scale(weight, scale), *(kept or (None, None)), *others)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in given]
    rank, columns = 0 if factors.a is None else len(factors.a), 0 if kept is None else len(kept[0])
    return _Linear(*pointers, *factors.weight.shape, rank, columns, factors.scaling)


def _readable(factors: LinearWeights) -> bool:
    weight, scale, bias, a, b, _ = factors
    out, width = weight.shape
    update = (a is None) == (b is None)
    if a is not None and b is not None:
        update = a.dtype == b.dtype == torch.float32 and a.shape == (len(a), width) and b.shape == (out, len(a))
    given = [tensor for tensor in factors[:5] if tensor is not None]
    rows, columns = split_scale(weight, scale)
    fit = bindings.fit(out, rows, bias) and bindings.fit(width, columns)
    return weight.dtype == torch.int8 and fit and update and bindings.usable(*given)


def _as_wide(norm: Norm | None, width: int) -> bool:
    return norm is None or (bindings.fit(width, norm.weight) and bindings.usable(norm.weight))


@cache
def _functions() -> tuple[Any, Any]:
    loops = bindings.library()
    loops.before_attention.argtypes = [_POINTER] * 4 + [_SIZE] + [_POINTER] * 4 + [_SIZE]
    loops.after_attention.argtypes = [_POINTER] * 8 + [_SIZE] * 2
    loops.before_attention.restype = loops.after_attention.restype = None
    return loops.before_attention, loops.after_attention


def before_attention(layer: Layer, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What attention takes.

    Args:
        layer: its weights.
        x: fp32 [n, 1, hidden], without gaps, on the CPU.
        cosine: fp32 [n or 1, 1, dim], of each text's position; without gaps.
        sine: likewise.

    Returns:
        q [n, 1, heads, dim], and k and v [n, heads of the cache, 1, dim], fp32.
    """
    n, dim = x.shape[0], layer.dim
    q = x.new_empty(n, 1, layer.heads, dim)
    k, v = x.new_empty(n, layer.narrow // dim, 1, dim), x.new_empty(n, layer.narrow // dim, 1, dim)
    room = x.new_empty(n * layer.room_before)
    step = 0 if cosine.shape[0] == 1 else dim
    _functions()[0](
        *(layer.at, x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), step),
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), room.data_ptr(), n),
    )
    return q, k, v


def after_attention(
    layer: Layer, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Attention over all keys, and the rest of the layer.

    Args:
        layer: its weights.
        x: what the layer was given, fp32 [n, 1, hidden].
        q: from :func:`before_attention`.
        keys: fp32 [n, heads of the cache, length, dim], the new one among them.
        values: likewise.
        seen: bool [n, length], which of them each text may look at; None for all.

    Returns:
        fp32 [n, 1, hidden].
    """
    n, length = x.shape[0], keys.shape[2]
    if keys.shape != values.shape or keys.shape != (n, layer.narrow // layer.dim, length, layer.dim):
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} are not those of {n} texts")
    if seen is not None and (seen.shape != (n, length) or seen.dtype != torch.bool):
        raise ValueError(f"a mask of {list(seen.shape)} for {n} texts of {length} tokens")
    keys, values = keys.contiguous(), values.contiguous()
    if not (keys.dtype == values.dtype == torch.float32 and bindings.usable(keys, values)):
        raise ValueError(f"keys are {keys.dtype} on {keys.device}, expected fp32 on the CPU")
    seen = None if seen is None else seen.contiguous()
    h, room = torch.empty_like(x), x.new_empty(n * (layer.room_after + layer.heads * length))
    _functions()[1](
        *(layer.at, x.data_ptr(), q.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(None if seen is None else seen.data_ptr(), h.data_ptr(), room.data_ptr(), n, length),
    )
    return h
