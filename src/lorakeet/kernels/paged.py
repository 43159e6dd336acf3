"""Decoder layers of the Llama family over pages: tokens of many sequences, each over its own pages and with its own adapter.

    a = x + W_o·attention(rope(W_q·n), K, V)        n  = norm(x);  rope(W_k·n) and W_v·n are written into the row's page
    h = a + W_down·(silu(W_gate·m) ∘ W_up·m)        m  = norm(a)

A row of the batch is one token. All layers are one call of C. A row's result is the same to the bit in any company, and for a
token of a prompt also in any division of the prompt: products round each row to int16 by itself and sum in integers
(``w8a16.h``), everything else is a function of one row. A and B of an adapter are rounded to int16 too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.cpu import abi, bindings, features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.memory import workspace
from lorakeet.kernels.decoder_step import Layer, LinearWeights, Norm, Update
from lorakeet.kernels.int8.format import dequantize


class UpdateTable:
    """An adapter in the layout that C reads: the A and B of every layer in 16 bits, with fp32 scales.

    A row of A and a column of B are rounded with one scale each. So a value is off by at most 1.6e-5 of the largest in its
    row or column. One with a value that is not finite makes the rows of its adapter NaN.

    Args:
        updates: For each decoder layer those of q, k, v, o, gate, up and down, or None.

    Attributes:
        rank: Largest rank.
        address: Address of the table.
        bytes: Bytes of its tensors.
    """

    def __init__(self, updates: Sequence[Sequence[Update | None]]) -> None:
        flat = [one if one is not None and len(one.a) else None for layer in updates for one in layer]
        shapes = [(0, 0, 0) if one is None else (len(one.a), len(one.b), one.a.shape[1]) for one in flat]
        sizes = [bindings.library().lk_packed_update_size(*shape) for shape in shapes]
        self._codes = torch.empty(sum(sizes), dtype=torch.int16)  # C reads these two
        self._scales = torch.empty(sum(rank for rank, _, _ in shapes))
        self._outputs = [None if one is None or one.output is None else one.output.detach().clone() for one in flat]
        self._table = (abi.Update * len(flat))()
        self.rank = max((rank for rank, _, _ in shapes), default=0)
        self.address = ctypes.addressof(self._table)
        outputs = [output for output in self._outputs if output is not None]
        self.bytes = sum(tensor.nbytes for tensor in (self._codes, self._scales, *outputs))
        all_codes, all_scales = self._codes.split(sizes), self._scales.split([rank for rank, _, _ in shapes])
        for at, (update, *memory) in enumerate(zip(flat, all_codes, all_scales, self._outputs, strict=True)):
            if update is not None:
                self._table[at] = _packed(update, *memory)

    def __bool__(self) -> bool:
        """Whether there is an update in any layer."""
        return self.rank > 0


def _packed(update: Update, codes: Tensor, scales: Tensor, output: Tensor | None) -> abi.Update:
    a, b = (one.detach().float().contiguous() for one in (update.a, update.b))
    (rank, inner), out = a.shape, len(b)
    tensors = a.data_ptr(), b.data_ptr(), update.scaling, codes.data_ptr(), scales.data_ptr()
    bindings.library().lk_pack_update(*tensors, rank, out, inner)
    return abi.Update(codes.data_ptr(), scales.data_ptr(), bindings.pointer(output), rank)


@dataclass(frozen=True)
class Rows:
    """Rows of a step.

    Attributes:
        tables: Pages of each sequence.
        owners: For each row, the index of its sequence.
        positions: For each row, its position in the sequence; rows of a sequence come in order.
        updates: For each row, its adapter or None; equal ones stand together.
    """

    tables: Sequence[Sequence[int]]
    owners: Sequence[int]
    positions: Sequence[int]
    updates: Sequence[UpdateTable | None]


class PagedLayers:
    """The decoder layers of a model, for rows over pages.

    Args:
        layers: The layers in order.

    Raises:
        ValueError: The layers differ in shape, are not in 8 bits, or have heads that C cannot read.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        shapes = {(one.hidden, one.wide, one.narrow, one.dim, one.struct.gate.out) for one in layers}
        if len(shapes) != 1 or any(one.is_packed for one in layers):
            raise ValueError(f"decoder layers must be int8 and of one shape, got {sorted(shapes)}")
        if layers[0].dim % abi.HEAD_STEP:
            raise ValueError(f"heads have width {layers[0].dim}, expected a multiple of {abi.HEAD_STEP}")
        self.layers = list(layers)  # C reads them
        self.hidden, self.dim, self.kv_heads = layers[0].hidden, layers[0].dim, layers[0].narrow // layers[0].dim
        self._addresses = (ctypes.c_void_p * len(layers))(*(one.address for one in layers))

    def run(self, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Compute the layers, and write the keys and values of the rows into their pages.

        Args:
            x: fp32 [n, hidden].
            rows: Sequence, position and adapter of each row.
            keys: fp32 [layers, pages, kv_heads, page_tokens, dim].
            values: Likewise.
            cosine: Of each row's position, fp32 [n, dim].
            sine: Likewise.

        Returns:
            fp32 [n, hidden].

        Raises:
            ValueError: A tensor has another shape or dtype, or a row lies outside of its pages.
        """
        self._check(x, rows, keys, values, cosine, sine)
        h = x.clone(memory_format=torch.contiguous_format)
        if not len(h):
            return h
        starts, total = [], 0
        for table in rows.tables:
            starts.append(total)
            total += len(table)
        flat = torch.tensor([page for table in rows.tables for page in table], dtype=torch.int64)
        numbers = torch.tensor(
            [
                [starts[owner] for owner in rows.owners],
                rows.positions,
                [one.address if one else 0 for one in rows.updates],
            ],
            dtype=torch.int64,
        )
        rank = max(one.rank if one else 0 for one in rows.updates)
        batch = abi.Paged(
            ctypes.addressof(self._addresses),
            *(tensor.data_ptr() for tensor in (keys, values, flat, numbers[0], numbers[1], cosine, sine, numbers[2])),
            *(len(self.layers), keys.shape[1], keys.shape[3], len(h), max(rows.positions) + 1, rank),
            features.has(Feature.AMX),
        )
        memory = workspace(bindings.library().lk_paged_workspace(ctypes.byref(batch)), torch.float32)
        bindings.library().lk_paged_layers(ctypes.byref(batch), h.data_ptr(), memory.data_ptr())
        return h

    def _check(self, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, cosine: Tensor, sine: Tensor) -> None:
        n, pool = len(rows.owners), (len(self.layers), keys.shape[1], self.kv_heads, keys.shape[3], self.dim)
        wanted = [(x, (n, self.hidden)), (keys, pool), (values, pool), (cosine, (n, self.dim)), (sine, (n, self.dim))]
        for tensor, shape in wanted:
            if tensor.shape != shape or tensor.dtype != torch.float32 or not bindings.is_cpu_contiguous(tensor):
                got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                raise ValueError(f"got {got}, expected contiguous fp32 {list(shape)} on the CPU")
        if keys.shape[3] % abi.PAGE_STEP:
            raise ValueError(f"a page has {keys.shape[3]} tokens, expected a multiple of {abi.PAGE_STEP}")
        if not n == len(rows.positions) == len(rows.updates):
            raise ValueError(f"{n} rows have {len(rows.positions)} positions and {len(rows.updates)} adapters")
        limits = [len(table) * keys.shape[3] for table in rows.tables]
        for owner, position in zip(rows.owners, rows.positions, strict=True):
            if not 0 <= position < limits[owner]:
                raise ValueError(f"position {position} is outside of the {limits[owner]} tokens of its pages")
        if wrong := {page for table in rows.tables for page in table if not 0 <= page < keys.shape[1]}:
            raise ValueError(f"pages {sorted(wrong)} are outside of the pool, which has {keys.shape[1]}")


def is_available() -> bool:
    """Whether this machine has the compiled loops."""
    return bindings.library() is not None and features.has(Feature.AVX2)


class LayerWeights(NamedTuple):
    """Operands of a decoder layer: q, k, v, o, gate, up and down; and the norms of :class:`Layer`."""

    linears: Sequence[LinearWeights]
    norms: Sequence[Norm | None]
    dim: int
    scaling: float


def paged_layers_reference(
    layers: Sequence[LayerWeights],
    x: Tensor,
    tables: Sequence[Sequence[int]],
    owners: Sequence[int],
    positions: Sequence[int],
    updates: Sequence[Sequence[Sequence[Update | None]] | None],
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
) -> Tensor:
    """Compute the reference of :meth:`PagedLayers.run` in plain torch, row by row, in x's dtype.

    Args:
        layers: Operands of each layer.
        x: [n, hidden].
        tables: As in :class:`Rows`, like the next two.
        owners: See there.
        positions: See there.
        updates: For each row the updates of each layer, or None.
        keys: [layers, pages, kv_heads, page_tokens, dim], in x's dtype; receives the rows' keys.
        values: Likewise.
        cosine: [n, dim].
        sine: [n, dim].

    Returns:
        [n, hidden].
    """
    h = x.clone()
    for number, layer in enumerate(layers):
        for i in range(len(x)):
            pages, position = torch.tensor(tables[owners[i]]), positions[i]
            own = updates[i]
            q, k, v, o, gate, up, down = (
                _Linear(one, None if own is None else own[number][at]) for at, one in enumerate(layer.linears)
            )
            before, after, of_q, of_k = layer.norms
            normed = _normalized(before, h[i])
            query, key = (one(normed).view(-1, layer.dim) for one in (q, k))
            query, key = (
                _rotated(_normalized(norm, one), cosine[i], sine[i]) for norm, one in ((of_q, query), (of_k, key))
            )
            size = keys.shape[3]
            page = int(pages[position // size])
            keys[number, page, :, position % size] = key
            values[number, page, :, position % size] = v(normed).view(-1, layer.dim)
            seen = [pool[number, pages].transpose(0, 1).flatten(1, 2)[:, : position + 1] for pool in (keys, values)]
            attended = F.scaled_dot_product_attention(
                query.unsqueeze(1), seen[0], seen[1], scale=layer.scaling, enable_gqa=True
            )
            a = h[i] + o(attended.flatten())
            m = _normalized(after, a)
            h[i] = a + down(F.silu(gate(m)) * up(m))
    return h


class _Linear:
    def __init__(self, weights: LinearWeights, update: Update | None) -> None:
        self.weights, self.update = weights, update

    def __call__(self, x: Tensor) -> Tensor:
        given = self.weights
        h = F.linear(x, dequantize(given.weight, given.scale, x.dtype))
        if given.bias is not None:
            h = h + given.bias.to(x.dtype)
        if self.update is not None:
            a, b = self.update.a.to(x.dtype), self.update.b.to(x.dtype)
            h = h + self.update.scaling * F.linear(F.linear(x, a), b)
            if self.update.output is not None:
                factor, added = self.update.output.to(x.dtype)
                h = factor * h + added
        return h


def _normalized(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat((-right, left), -1) * sine
