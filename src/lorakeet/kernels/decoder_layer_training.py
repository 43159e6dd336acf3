"""Decoder layer of the Llama family in training: forward and backward of all its operations in one call of C each.

    a = x + W_o·attention(rope(W_q·n), rope(W_k·n), W_v·n)        n = norm(x)
    h = a + W_down·(f(W_gate·m) ∘ W_up·m)                         m = norm(a)

Each W is frozen, in fp32, in 16 bits or in int8, and may have a low-rank update with dropout
(:mod:`lorakeet.kernels.lora_linear`). Around thirty operations of torch, with their autograd nodes and their new memory,
become two calls. The loops and products are those of the single modules, in the same order, so all bits are the same
(``training_layer.c``). Saved for backward: the layer's input, and one buffer with what the single modules would save,
without the outputs of norms, which are computed again.
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
#: Products of a weight that is stored in 16 bits.
_STORED = {torch.bfloat16: abi.BF16, torch.float16: abi.FP16}
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


class Buffers:
    """Memory of the layers of a model, which passes use again.

    Attributes:
        kept: For the backward pass; one buffer for each layer.
        scratch: During a call.
    """

    def __init__(self) -> None:
        self.kept, self.scratch = BufferPool(), BufferPool()


class TrainedLinear(NamedTuple):
    """A frozen linear layer and its update: h = x·W₀ᵀ + bias + scaling·dropout(x)·Aᵀ·Bᵀ.

    Attributes:
        weight: fp32 or int8 [out, in]; or bf16 or fp16, which is computed as if it were fp32.
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

    def tensors(self) -> list[Tensor | None]:
        """Return the weights of the norms, and those of each linear layer as :meth:`TrainedLinear.tensors` has them."""
        own = [tensor for linear in self.linears for tensor in linear.tensors()]
        return [self.before.weight, self.after.weight, *own]

    def products(self, x: Tensor) -> list[str | None]:
        """Return the name of each linear layer's 8-bit product; None for a weight that is not in 8 bits."""
        rows = x[0]
        return [None if one.scale is None else registry.best(rows, one.weight).name for one in self.linears]


def why_not(layer: TrainedLayer, x: Tensor, cosine: Tensor, sine: Tensor) -> str | None:
    """Return why C cannot compute a layer, in half a sentence; None if it can.

    Args:
        layer: The layer.
        x: Hidden states [1, n, hidden].
        cosine: Of the positions, [1, n, head_width].
        sine: Likewise.
    """
    return why_not_row(layer, x, (cosine, sine)) or why_not_weights(layer, x)


def why_not_row(layer: TrainedLayer, x: Tensor, angles: tuple[Tensor, Tensor]) -> str | None:
    """Return why C cannot compute a layer of any weights on a row with cosine and sine of its positions."""
    cosine, sine = angles
    if not features.has(Feature.AVX2) or bindings.library() is None:
        return "this processor has no AVX2, or there is no C compiler"
    if not bindings.supports(x, cosine, sine) or x.dim() != 3 or x.shape[0] != 1 or torch.is_autocast_enabled("cpu"):
        return "its input is not one contiguous fp32 row on a CPU, outside of autocast"
    n, dim = x.shape[1], layer.head_width
    if n <= gemm.GEMV_TOKENS:
        return f"it has {gemm.GEMV_TOKENS} tokens or fewer"
    if not (cosine.shape == sine.shape == (1, n, dim)) or dim % abi.HEAD_STEP or dim > abi.MAX_HEAD_WIDTH:
        return f"its heads are {dim} wide, expected multiples of {abi.HEAD_STEP} up to {abi.MAX_HEAD_WIDTH}"
    return None


def why_not_weights(layer: TrainedLayer, x: Tensor) -> str | None:
    """Return why C cannot read the weights of a layer, in half a sentence; None if it can."""
    if not _shapes_fit(layer, x.shape[2]):
        return "its weights have the shapes of no layer of the Llama family"
    for norm in (layer.before, layer.after):
        if not _is_vector(norm.weight, x.shape[2]) or norm.weight.requires_grad:
            return "a norm is trained, or not in fp32"
    return next((reason for linear in layer.linears if (reason := _why_not_linear(linear, x))), None)


def _shapes_fit(layer: TrainedLayer, hidden: int) -> bool:
    (wide, _), (narrow, _), (inner, _) = (tuple(layer.linears[i].weight.shape) for i in (0, 1, 4))
    below = (wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide)
    wanted = [*below, (inner, hidden), (inner, hidden), (hidden, inner)]
    dim = layer.head_width
    return [linear.weight.shape for linear in layer.linears] == wanted and not (
        not narrow or wide % dim or narrow % dim or wide % narrow
    )


def _fit(a: Tensor, b: Tensor, out: int, width: int) -> bool:
    return a.shape[1:] == (width,) and b.shape == (out, len(a))


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
    if a is not None and b is not None and not (bindings.supports(a, b) and _fit(a, b, out, width)):
        return "an adapter is not in fp32, or its shapes do not fit"
    if scale is None:
        if weight.dtype not in (torch.float32, *_STORED):
            return f"a weight is {weight.dtype}, expected fp32, 16 bits or int8"
        if weight.dtype in _STORED:
            return "its products are in tiles of AMX" if in_tiles() else None
        return None if gemm.has_fast_f32() or fixed_order.is_active() else "torch's fp32 products are faster here"
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
    struct: abi.TrainingLayer,
    buffers: Buffers,
    output: bool = True,
) -> Tensor:
    """Compute a decoder layer for samples end to end in one row, each of which attends to itself alone.

    Args:
        layer: The layer; :func:`why_not` has answered None for it and the tensors.
        x: fp32 [1, n, hidden].
        cosine: fp32 [1, n, head_width].
        sine: Likewise.
        lengths: Positions of each sample, none of them 0; their sum is n.
        struct: The layer from :func:`weights_struct`; it is copied.
        buffers: Memory of all layers of the model.
        output: Compute the output; otherwise its values are undefined, and only the backward pass is prepared.

    Returns:
        fp32 [1, n, hidden].
    """
    learnt = [tensor for linear in layer.linears for tensor in (linear.a, linear.b) if tensor is not None]
    h: Tensor = _DecoderLayer.apply(x, cosine, sine, _Call(layer, lengths, struct, buffers, output), *learnt)
    return h


class _Call:
    """The struct of a call, from tensors that autograd has saved, and numbers that are the same in both directions."""

    def __init__(
        self, layer: TrainedLayer, lengths: tuple[int, ...], struct: abi.TrainingLayer, buffers: Buffers, output: bool
    ) -> None:
        """Draw the seeds of all dropout masks, in the order of the modules."""
        self.layer, self.buffers, self.output = layer, buffers, output
        self.updated = [index for index, linear in enumerate(layer.linears) if linear.a is not None]
        self.wants: list[tuple[bool, bool]] = []  # of each of these layers, whether A and B get a gradient
        self._samples = sample_tensors(lengths)  # C reads these tensors: they stay in memory
        self._n, self._count = sum(lengths), len(lengths)
        self._seeds = [(i, *seed_halves(draw_seed())) for i, linear in enumerate(layer.linears) if linear.p]
        self._struct = abi.TrainingLayer.from_buffer_copy(struct)
        self._addresses: list[int | None] = []

    def struct(self, row: tuple[Tensor, Tensor, Tensor], tensors: Sequence[Any]) -> abi.TrainingLayer:
        """Return the struct that C reads, for x, cosine and sine, and the tensors of :meth:`TrainedLayer.tensors`.

        The struct of the forward pass serves the backward pass too, unless autograd's hooks have moved a tensor.
        """
        addresses = [pointer(tensor) for tensor in (*row, *tensors)]
        if addresses != self._addresses:
            if self._addresses:
                self._struct = weights_struct(self.layer, row[0], tensors)
            self._addresses = addresses
            self._fill(row)
        packed = workspace(bindings.library().lk_training_packed(self._struct), torch.int8)
        self._struct.packed, self._struct.seconds = packed.data_ptr(), pointer(_watched)
        return self._struct

    def _fill(self, row: tuple[Tensor, Tensor, Tensor]) -> None:
        """Write what belongs to the call alone."""
        struct = self._struct
        struct.x, struct.cosine, struct.sine, struct.starts, struct.lengths = map(pointer, (*row, *self._samples))
        struct.n, struct.samples = self._n, self._count
        for index, wants in zip(self.updated, self.wants, strict=True):
            struct.linears[index].learns = wants[0]
        for index, low, high in self._seeds:
            struct.linears[index].low, struct.linears[index].high = low, high


def weights_struct(layer: TrainedLayer, x: Tensor, tensors: Sequence[Any]) -> abi.TrainingLayer:
    """Write the numbers and weights of a layer into a new struct; what belongs to a call is empty.

    Args:
        layer: The layer.
        x: Hidden states [1, n, hidden].
        tensors: Those of :meth:`TrainedLayer.tensors`, wherever they are in memory.
    """
    (q, k), dim = (layer.linears[i].weight.shape[0] for i in (0, 1)), layer.head_width
    given = enumerate(zip(layer.linears, layer.products(x), strict=True))
    linears = [_linear_struct(one, tensors[2 + 5 * i : 7 + 5 * i], name) for i, (one, name) in given]
    return abi.TrainingLayer(
        linears=(abi.TrainedLinear * abi.LINEARS)(*linears),
        before=abi.Norm(tensors[0].data_ptr(), layer.before.eps),
        after=abi.Norm(tensors[1].data_ptr(), layer.after.eps),
        attention=abi.Attention(q // dim, k // dim, dim, layer.window or 0, layer.causal, layer.scale),
        activation=layer.activation,
        narrow=layer.narrow,
    )


def _linear_struct(linear: TrainedLinear, tensors: Sequence[Any], product: str | None) -> abi.TrainedLinear:
    weight, scale, bias, a, b = tensors
    if product is None:
        given = weight, *[None] * 6, bias, a, b, None
        own = abi.Linear(*map(pointer, given), *weight.shape, 0 if a is None else len(a), 0, linear.scaling)
        number = _STORED.get(weight.dtype, 0)
    else:
        own, number = linear_struct(LinearWeights(weight, scale, bias, a, b, linear.scaling)), _PRODUCTS[product]
    levels = dropped_levels(linear.p) if linear.p else 0
    return abi.TrainedLinear(linear=own, levels=levels, keep=keep_scale(linear.p), product=number)


class _DecoderLayer(torch.autograd.Function):
    """x [1, n, hidden] -> [1, n, hidden]; A and B of each updated layer come last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, call: _Call, *learnt: Tensor) -> Tensor:  # type: ignore[override]
        wanted = ctx.needs_input_grad[4:]
        call.wants = list(zip(wanted[::2], wanted[1::2], strict=True))
        tensors, library = call.layer.tensors(), bindings.library()
        struct = call.struct((x, cosine, sine), tensors)
        kept = call.buffers.kept.empty(library.lk_training_kept(struct))
        h = transient_empty(x, *x.shape)
        scratch = call.buffers.scratch.empty(library.lk_training_workspace(struct, False))
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
        for index, wants in zip(call.updated, call.wants, strict=True):
            pair = tensors[5 + 5 * index : 7 + 5 * index]
            given = [torch.empty_like(t) if wanted else None for t, wanted in zip(pair, wants, strict=True)]
            struct.linears[index].da, struct.linears[index].db = map(pointer, given)
            made += given
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        scratch = call.buffers.scratch.empty(library.lk_training_workspace(struct, True))
        library.lk_training_backward(struct, *map(pointer, (kept, grad, dx, scratch)))
        return dx, None, None, None, *made
