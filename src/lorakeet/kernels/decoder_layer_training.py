"""Decoder layer of the Llama family in training: forward and backward of all its operations in one call of C each.

    a = x + W_o·attention(rope(W_q·n), rope(W_k·n), W_v·n)        n = norm(x)
    h = a + W_down·(f(W_gate·m) ∘ W_up·m)                         m = norm(a)

Each W is frozen, in fp32, in 16 bits or in int8, and may have a low-rank update with dropout
(:mod:`lorakeet.kernels.lora_linear`). Around thirty operations of torch, with their autograd nodes and their new memory,
become two calls. The loops and products are those of the single modules, in the same order, so all bits are the same
(``training_layer.c``). Saved for backward: the layer's input, and one buffer with what the single modules would save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakeet.kernels import fixed_order
from lorakeet.kernels.attention.cpu import sample_tensors
from lorakeet.kernels.cpu import abi, bindings, features, gemm
from lorakeet.kernels.cpu.bindings import pointer
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.memory import BufferPool, transient_empty, workspace
from lorakeet.kernels.decoder_step import LinearWeights, Norm, linear_struct
from lorakeet.kernels.dropout import draw_seed, dropped_levels, keep_scale, seed_halves
from lorakeet.kernels.half_linear import in_tiles
from lorakeet.kernels.int8 import registry
from lorakeet.kernels.int8.format import split_scale

#: Products of C by the name of their back end in the registry.
_PRODUCTS = {"pairs": abi.PAIRS, "vnni": abi.VNNI, "amx": abi.AMX}
#: Products of C by the number format of a weight without scale.
_WIDE = {torch.float32: 0, torch.bfloat16: abi.BF16, torch.float16: abi.FP16}

#: Seconds of each kind of work of :data:`~lorakeet.kernels.cpu.abi.WORK`, to which all calls add; None: not measured.
_watched: Tensor | None = None


@contextmanager
def watched_work() -> Iterator[Callable[[], dict[str, float]]]:
    """Measure the seconds that C takes for each kind of work inside the block; yields what returns them so far."""
    global _watched
    _watched = seconds = torch.zeros(len(abi.WORK) + 1, dtype=torch.float64)
    try:
        yield lambda: dict(zip(abi.WORK, seconds.tolist(), strict=False))
    finally:
        _watched = None


class TrainedLinear(NamedTuple):
    """A frozen linear layer and its update: h = x·W₀ᵀ + bias + scaling·dropout(x)·Aᵀ·Bᵀ.

    Attributes:
        weight: fp32, bf16, fp16 or int8 [out, in].
        scale: Of an int8 weight, as :mod:`lorakeet.kernels.int8.format` describes it; None for others.
        bias: fp32 [out] or None.
        a: fp32 [r, in], or None without an update.
        b: fp32 [out, r], or None without an update.
        scaling: Factor of the update.
        p: Dropout probability of the update's input.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0
    p: float = 0.0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return weight, scale, bias, A and B."""
        return self[:5]


class TrainedLayer(NamedTuple):
    """A decoder layer in training.

    Attributes:
        linears: q, k, v, o, gate, up, down.
        before: Norm before attention.
        after: Norm after attention.
        head_width: Values of a head.
        scale: Factor of the products of q and k.
        causal: Position i sees j ≤ i alone.
        window: As in :class:`lorakeet.kernels.attention.pattern.Pattern`.
        activation: Number of f, as for :func:`lorakeet.kernels.cpu.bindings.gated`.
        narrow: Whether gate and up are kept in bf16 for the backward pass.
    """

    linears: tuple[TrainedLinear, ...]
    before: Norm
    after: Norm
    head_width: int
    scale: float
    causal: bool
    window: int | None
    activation: int
    narrow: bool


def why_not(layer: TrainedLayer, x: Tensor, cosine: Tensor, sine: Tensor) -> str | None:
    """Return why C cannot compute a layer, in half a sentence; None if it can.

    Args:
        layer: The layer.
        x: Hidden states [1, n, hidden].
        cosine: Of the positions, [1, n, head_width].
        sine: Likewise.
    """
    if not features.has(Feature.AVX2) or bindings.library() is None:
        return "this processor has no AVX2, or there is no C compiler"
    if not bindings.supports(x, cosine, sine) or x.dim() != 3 or x.shape[0] != 1 or torch.is_autocast_enabled("cpu"):
        return "its input is not one contiguous fp32 row on a CPU, outside of autocast"
    n, dim = x.shape[1], layer.head_width
    if n <= gemm.GEMV_TOKENS:
        return f"it has {gemm.GEMV_TOKENS} tokens or fewer"
    if not (cosine.shape == sine.shape == (1, n, dim)) or dim % abi.HEAD_STEP or dim > abi.MAX_HEAD_WIDTH:
        return f"its heads are {dim} wide, expected multiples of {abi.HEAD_STEP} up to {abi.MAX_HEAD_WIDTH}"
    if not _shapes_fit(layer, x.shape[2]):
        return "its weights have the shapes of no layer of the Llama family"
    for norm in (layer.before, layer.after):
        if not _is_vector(norm.weight, x.shape[2]) or norm.weight.requires_grad:
            return "a norm is trained, or not in fp32"
    return next((reason for linear in layer.linears if (reason := _why_not_linear(linear, x))), None)


def _shapes_fit(layer: TrainedLayer, hidden: int) -> bool:
    (wide, _), (narrow, _), (inner, _) = (tuple(layer.linears[i].weight.shape) for i in (0, 1, 4))
    wanted = [
        (wide, hidden),
        (narrow, hidden),
        (narrow, hidden),
        (hidden, wide),
        *[(inner, hidden)] * 2,
        (hidden, inner),
    ]
    dim = layer.head_width
    return [linear.weight.shape for linear in layer.linears] == wanted and not (
        not narrow or wide % dim or narrow % dim or wide % narrow
    )


def _is_vector(tensor: Tensor | None, width: int) -> bool:
    return bindings.is_fp32_vector(width, tensor) and (tensor is None or bindings.is_cpu_contiguous(tensor))


def _why_not_linear(linear: TrainedLinear, x: Tensor) -> str | None:
    """Return why C cannot multiply by a linear layer, in half a sentence; None if it can."""
    weight, scale, bias, a, b = linear.tensors()
    assert weight is not None
    out, width = weight.shape
    if not bindings.is_cpu_contiguous(weight) or weight.requires_grad or not _is_vector(bias, out):
        return "a weight is trained, or not contiguous on the CPU"
    if bias is not None and bias.requires_grad:
        return "a bias is trained"
    if a is not None and b is not None:
        fits = bindings.supports(a, b) and a.shape[1:] == (width,) and b.shape == (out, len(a))
        if not fits:
            return "an adapter is not in fp32, or its shapes do not fit"
    if scale is None:
        if weight.dtype not in _WIDE:
            return f"a weight is {weight.dtype}, expected fp32, 16 bits or int8"
        if weight.dtype == torch.bfloat16 and in_tiles():
            return "its products are in tiles of AMX"
        ours = weight.dtype != torch.float32 or gemm.has_fast_f32()
        return None if ours or fixed_order.is_active() else "torch's fp32 products are faster here"
    row_scale, column_scale = split_scale(weight, scale)
    if weight.dtype != torch.int8 or not _is_vector(row_scale, out) or not _is_vector(column_scale, width):
        return "the scales of a weight do not fit"
    chosen = registry.best(x[0], weight).name
    return None if chosen in _PRODUCTS else f"its 8-bit products are those of {chosen}"


def decoder_layer(
    layer: TrainedLayer,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    lengths: tuple[int, ...],
    pool: BufferPool,
    output: bool = True,
) -> Tensor:
    """Compute a decoder layer for samples end to end in one row, each of which attends to itself alone.

    Args:
        layer: The layer; :func:`why_not` has answered None for it and the tensors.
        x: fp32 [1, n, hidden].
        cosine: fp32 [1, n, head_width].
        sine: Likewise.
        lengths: Positions of each sample, none of them 0; their sum is n.
        pool: Source of the buffers.
        output: Compute the output; otherwise its values are undefined, and only the backward pass is prepared.

    Returns:
        fp32 [1, n, hidden].
    """
    learnt = [tensor for linear in layer.linears for tensor in (linear.a, linear.b) if tensor is not None]
    h: Tensor = _DecoderLayer.apply(x, cosine, sine, _Call(layer, lengths, x.shape[1], pool, output), *learnt)
    return h


class _Call:
    """The struct of a call, from tensors that autograd has saved, and numbers that are the same in both directions."""

    def __init__(self, layer: TrainedLayer, lengths: tuple[int, ...], n: int, pool: BufferPool, output: bool) -> None:
        """Draw the seeds of all dropout masks, in the order of the modules."""
        self.layer, self.lengths, self.n, self.pool, self.output = layer, lengths, n, pool, output
        self.wants: list[tuple[bool, bool]] = []  # of each layer, whether A and B get a gradient
        self.seeds = [seed_halves(draw_seed()) if linear.p else (0, 0) for linear in layer.linears]

    def tensors(self) -> list[Tensor | None]:
        """Return the weights and adapters, in the order in which :meth:`struct` takes them."""
        own = [tensor for linear in self.layer.linears for tensor in linear.tensors()]
        return [self.layer.before.weight, self.layer.after.weight, *own]

    def struct(self, row: tuple[Tensor, Tensor, Tensor], tensors: Sequence[Any]) -> abi.TrainingLayer:
        """Return the struct that C reads, for x, cosine and sine, and the tensors of :meth:`tensors`."""
        x, cosine, sine = row
        layer, (q, k) = self.layer, (self.layer.linears[i].weight.shape[0] for i in (0, 1))
        dim = layer.head_width
        linears = [self._linear(i, x, tensors[2 + 5 * i : 7 + 5 * i]) for i in range(abi.LINEARS)]
        starts, counts = sample_tensors(self.lengths)
        made = abi.TrainingLayer(
            (abi.TrainedLinear * abi.LINEARS)(*linears),
            abi.Norm(tensors[0].data_ptr(), layer.before.eps),
            abi.Norm(tensors[1].data_ptr(), layer.after.eps),
            abi.Attention(q // dim, k // dim, dim, layer.window or 0, layer.causal, layer.scale),
            *map(pointer, (x, cosine, sine, starts, counts, None, _watched)),
            *(self.n, len(self.lengths), layer.activation, layer.narrow),
        )
        made.packed = workspace(bindings.library().lk_training_packed(made), torch.int8).data_ptr()
        return made

    def _linear(self, index: int, x: Tensor, tensors: Sequence[Any]) -> abi.TrainedLinear:
        linear = self.layer.linears[index]
        weight, scale, bias, a, b = tensors
        if scale is None:
            given = weight, *[None] * 6, bias, a, b, None
            own = abi.Linear(*map(pointer, given), *weight.shape, 0 if a is None else len(a), 0, linear.scaling)
            product = _WIDE[weight.dtype]
        else:
            own = linear_struct(LinearWeights(weight, scale, bias, a, b, linear.scaling))
            product = _PRODUCTS[registry.best(x[0], weight).name]
        levels = dropped_levels(linear.p) if linear.p else 0
        return abi.TrainedLinear(
            own, None, None, *self.seeds[index], levels, keep_scale(linear.p), self.wants[index][0], product
        )


class _DecoderLayer(torch.autograd.Function):
    """x [1, n, hidden] -> [1, n, hidden]; A and B of each updated layer come last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, call: _Call, *learnt: Tensor) -> Tensor:  # type: ignore[override]
        wanted = iter(ctx.needs_input_grad[4:])
        for linear in call.layer.linears:
            call.wants.append((False, False) if linear.a is None else (next(wanted), next(wanted)))
        tensors, library = call.tensors(), bindings.library()
        struct = call.struct((x, cosine, sine), tensors)
        kept = call.pool.empty(library.lk_training_kept(struct))
        h, scratch = transient_empty(x, *x.shape), call.pool.empty(library.lk_training_workspace(struct, False))
        library.lk_training_forward(struct, *map(pointer, (kept, h if call.output else None, scratch)))
        ctx.save_for_backward(x, cosine, sine, kept, *tensors)
        ctx.call = call
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call, library = ctx.call, bindings.library()
        x, cosine, sine, kept, *tensors = ctx.saved_tensors
        struct, grad = call.struct((x, cosine, sine), tensors), grad.contiguous()
        made: list[Tensor | None] = []
        for index, wants in enumerate(call.wants):
            pair = tensors[5 + 5 * index : 7 + 5 * index]
            if pair[0] is None:
                continue
            given = [torch.empty_like(t) if wanted else None for t, wanted in zip(pair, wants, strict=True)]
            struct.linears[index].da, struct.linears[index].db = map(pointer, given)
            made += given
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        scratch = call.pool.empty(library.lk_training_workspace(struct, True))
        library.lk_training_backward(struct, *map(pointer, (kept, grad, dx, scratch)))
        return dx, None, None, None, *made
