"""Decoder step in 8 or 4 bits: one new token of each of a few texts through a layer of the Llama family, in two calls of C.

    a = x + W_o·attention(rope(W_q·n), rope(W_k·n), W_v·n)        n  = norm(x)
    h = a + W_down·(silu(W_gate·m) ∘ W_up·m)                      m  = norm(a)

At batch one the products read a quarter of fp32's bytes. The operations between them, some twenty modules of plain
torch, would
cost more than the products. The reference is the layer's own forward: :mod:`lorakeet.inference.fast_decode` compares them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakeet.kernels.cpu import abi, bindings
from lorakeet.kernels.cpu.bindings import pointer
from lorakeet.kernels.int8.format import outlier_columns, split_scale
from lorakeet.kernels.nf4.format import Nf4Tensors, is_readable


class Update(NamedTuple):
    """The update of a linear layer by an adapter: h + scaling·B·A·x, or c∘(h + scaling·B·A·x) + d.

    Attributes:
        a: fp32 [r, in].
        b: fp32 [out, r].
        scaling: Factor of the low-rank update.
        output: c and d, fp32 [2, out]; None for 1 and 0. DoRA scales outputs, and a bias of B is added to them.
    """

    a: Tensor
    b: Tensor
    scaling: float
    output: Tensor | None = None


class LinearWeights(NamedTuple):
    """Weights of a linear layer and its adapter: h = c∘(x·W₀ᵀ + bias + scaling·x·Aᵀ·Bᵀ) + d.

    Attributes:
        weight: int8 [out, in]; or codes of NF4, as :mod:`lorakeet.kernels.nf4.format` describes them.
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it; or the scales of NF4, ``absmax``.
        bias: fp32 [out] or None.
        a: fp32 [r, in], or None without an adapter.
        b: fp32 [out, r], or None without an adapter.
        scaling: Factor of the low-rank update.
        nested: Scales of the scales of NF4, or None.
        packed: (out, in) of a weight in NF4; None for int8.
        output: c and d, fp32 [2, out]; None for 1 and 0.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0
    nested: Tensor | None = None
    packed: tuple[int, int] | None = None
    output: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, (out, in)."""
        return self.packed or (self.weight.shape[0], self.weight.shape[1])


class Norm(NamedTuple):
    """An RMS norm, x / √(mean(x²) + eps) ∘ weight; weight fp32 [width]."""

    weight: Tensor
    eps: float


class Layer:
    """A decoder layer in the struct that C reads.

    Args:
        linears: q, k, v, o, gate, up, down.
        norms: Before attention and after it; of each head of q and of k, or None and None.
        dim: Width of a head.
        scaling: Factor of the products of q and k.

    Raises:
        ValueError: The tensors do not fit each other, or C cannot read them.
    """

    def __init__(
        self, linears: Sequence[LinearWeights], norms: Sequence[Norm | None], dim: int, scaling: float
    ) -> None:
        shapes = [linear.shape for linear in linears]
        (wide, hidden), (narrow, _), (inner, _) = shapes[0], shapes[1], shapes[4]
        wanted = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide), *[(inner, hidden)] * 2]
        if shapes != [*wanted, (hidden, inner)] or wide % dim or narrow % dim or wide % max(narrow, 1) or dim % 2:
            raise ValueError(f"the weights do not form a decoder layer with heads of width {dim}: got {shapes}")
        if not all(map(_readable, linears)) or not all(map(_norm_readable, norms, (hidden, hidden, dim, dim))):
            raise ValueError(
                "the weights of a decoder layer must be contiguous CPU tensors: int8 or NF4, all else fp32"
            )
        # C reads these tensors: they stay in memory even if a parameter gets another tensor as its data.
        self.tensors = [t.detach() for group in (*linears, *norms) if group for t in group if isinstance(t, Tensor)]
        self.hidden, self.wide, self.narrow, self.dim = hidden, wide, narrow, dim
        self.heads = wide // dim
        self.is_packed = any(linear.packed is not None for linear in linears)
        rank = max(0 if linear.a is None else len(linear.a) for linear in linears)
        #: Floats of workspace for each text, before attention and after it.
        self.workspace_before, self.workspace_after = hidden + rank, wide + hidden + 2 * inner + rank
        self.struct = abi.Layer(
            *map(linear_struct, linears),
            *(abi.Norm(None, 0) if norm is None else abi.Norm(norm.weight.data_ptr(), norm.eps) for norm in norms),
            *(self.heads, narrow // dim, dim),
            scaling,
        )
        self.address = ctypes.addressof(self.struct)


def linear_struct(weights: LinearWeights) -> abi.Linear:
    """Return the struct of a linear layer that C reads; its tensors must stay in memory."""
    weight, scale, bias, a, b, scaling, nested, packed, output = weights
    rank = 0 if a is None else len(a)
    tensors: tuple[Tensor | None, ...]
    if packed is not None:
        tensors = weight, scale, nested, None, None, None, None, bias, a, b, output
        return abi.Linear(*map(pointer, tensors), *packed, rank, 0, scaling)
    positions, values = outlier_columns(weight, scale) or (None, None)
    tensors = weight, None, None, *split_scale(weight, scale), positions, values, bias, a, b, output
    outliers = 0 if positions is None else len(positions)
    return abi.Linear(*map(pointer, tensors), *weight.shape, rank, outliers, scaling)


def _readable(weights: LinearWeights) -> bool:
    weight, scale, bias, a, b, _, nested, packed, output = weights
    out, width = weights.shape
    update = (a is None) == (b is None) and (output is None or output.shape == (2, out))
    if a is not None and b is not None:
        update = a.dtype == b.dtype == torch.float32 and a.shape == (len(a), width) and b.shape == (out, len(a))
    tensors = [tensor for tensor in (*weights[:5], nested, output) if tensor is not None]
    if packed is not None:
        given = Nf4Tensors(weight, scale, nested, packed)
        return (
            update
            and is_readable(given)
            and bindings.is_fp32_vector(out, bias)
            and bindings.is_cpu_contiguous(*tensors)
        )
    row_scale, column_scale = split_scale(weight, scale)
    fits = bindings.is_fp32_vector(out, row_scale, bias) and bindings.is_fp32_vector(width, column_scale)
    return weight.dtype == torch.int8 and fits and update and bindings.is_cpu_contiguous(*tensors)


def _norm_readable(norm: Norm | None, width: int) -> bool:
    return norm is None or (bindings.is_fp32_vector(width, norm.weight) and bindings.is_cpu_contiguous(norm.weight))


def before_attention(layer: Layer, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the inputs of attention: norm, projections and rotary positions.

    Args:
        layer: The weights.
        x: fp32 [n, 1, hidden], contiguous, on the CPU.
        cosine: Of each text's position, fp32 [n or 1, 1, dim], contiguous.
        sine: Likewise.

    Returns:
        q [n, 1, heads, dim], and k and v [n, heads of the cache, 1, dim], fp32.
    """
    n, dim = x.shape[0], layer.dim
    q = x.new_empty(n, 1, layer.heads, dim)
    k, v = x.new_empty(n, layer.narrow // dim, 1, dim), x.new_empty(n, layer.narrow // dim, 1, dim)
    workspace = x.new_empty(n * layer.workspace_before)
    step = 0 if cosine.shape[0] == 1 else dim
    bindings.library().lk_before_attention(
        *(layer.address, x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), step),
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), workspace.data_ptr(), n),
    )
    return q, k, v


def after_attention(
    layer: Layer, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Compute attention over all keys, and the rest of the layer.

    Args:
        layer: The weights.
        x: The input of the layer, fp32 [n, 1, hidden].
        q: From :func:`before_attention`.
        keys: fp32 [n, heads of the cache, length, dim], the new one included.
        values: Likewise.
        seen: The keys that each text may attend to, bool [n, length]; None for all.

    Returns:
        fp32 [n, 1, hidden].

    Raises:
        ValueError: Keys, values or the mask have the wrong shape or dtype.
    """
    n, length = x.shape[0], keys.shape[2]
    if keys.shape != values.shape or keys.shape != (n, layer.narrow // layer.dim, length, layer.dim):
        wanted = [n, layer.narrow // layer.dim, "length", layer.dim]
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} must be {wanted}")
    if seen is not None and (seen.shape != (n, length) or seen.dtype != torch.bool):
        raise ValueError(f"the mask is {seen.dtype} {list(seen.shape)}, expected bool [{n}, {length}]")
    keys, values = keys.contiguous(), values.contiguous()
    if not (keys.dtype == values.dtype == torch.float32 and bindings.is_cpu_contiguous(keys, values)):
        raise ValueError(f"keys are {keys.dtype} on {keys.device}, expected fp32 on the CPU")
    seen = None if seen is None else seen.contiguous()
    h, workspace = torch.empty_like(x), x.new_empty(n * (layer.workspace_after + layer.heads * length))
    bindings.library().lk_after_attention(
        *(layer.address, x.data_ptr(), q.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(None if seen is None else seen.data_ptr(), h.data_ptr(), workspace.data_ptr(), n, length),
    )
    return h
