"""Elementwise operations in C, and the checks that tensors pass before any C function reads their memory.

The functions trust their arguments. Callers ask :func:`supports`, :func:`is_cpu_contiguous` and :func:`is_fp32_vector` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.kernels.cpu.build import library as library  # others ask for it here, beside the checks
from lorakeet.kernels.cpu.memory import transient_empty

#: Functions of this module that compute; ``elementwise.c`` has their loops.
ELEMENTWISE = ("gated", "gated_backward", "rms_norm", "rms_norm_backward", "rotary", "dropout", "cross_entropy")
#: Exact types whose ``data_ptr`` is their data: no wrapper subclass (DTensor, FakeTensor, vmap).
PLAIN = (Tensor, torch.nn.Parameter)


def is_cpu_contiguous(*tensors: Tensor) -> bool:
    """Whether the library is there and can read these: contiguous, on the CPU, of a plain type, outside of a compiler."""
    if library() is None or torch.compiler.is_compiling():
        return False
    for t in tensors:  # noqa: SIM110 - no generator: this runs for every layer and token
        if not (t.is_cpu and t.is_contiguous() and type(t) in PLAIN):
            return False
    return True


def is_plain_fp32(tensor: Tensor) -> bool:
    """Whether a tensor, or a contiguous copy of it, can be read: fp32, not empty, on the CPU, of a plain type."""
    plain = tensor.dtype == torch.float32 and tensor.is_cpu and type(tensor) in PLAIN and tensor.numel() > 0
    return plain and not torch.compiler.is_compiling() and library() is not None


def is_fp32_vector(width: int, *vectors: Tensor | None) -> bool:
    """Whether all vectors are fp32 [width] or None: C would read beyond one that is shorter."""
    return all(v is None or (v.dtype == torch.float32 and v.shape == (width,)) for v in vectors)


def supports(*tensors: Tensor) -> bool:
    """Whether the elementwise operations can read these: fp32, not empty, and :func:`is_cpu_contiguous`."""
    return all(t.dtype == torch.float32 and t.numel() for t in tensors) and is_cpu_contiguous(*tensors)


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's data."""
    return None if tensor is None else tensor.data_ptr()


def gated(gate: Tensor, up: Tensor, kind: int, narrow: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Compute f(gate)·up.

    Args:
        gate: fp32, any shape.
        up: fp32, of the same shape.
        kind: f: 0 for SiLU, 1 for GELU by tanh.
        narrow: Return gate and up in bf16.

    Returns:
        f(gate)·up, gate and up.
    """
    h = transient_empty(gate, *gate.shape)
    saved = [torch.empty_like(t, dtype=torch.bfloat16) for t in (gate, up)] if narrow else [None, None]
    tensors = gate, up, h, *saved
    library().lk_gated(*map(pointer, tensors), gate.numel(), kind)
    return h, *(own if made is None else made for own, made in zip((gate, up), saved, strict=True))  # type: ignore[return-value]


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Compute the gradients ∂gate = f'(gate)·up·grad and ∂up = f(gate)·grad.

    Args:
        grad: fp32, any shape.
        gate: Of that shape, fp32 or bf16.
        up: Of that shape and gate's dtype.
        kind: As for :func:`gated`.
    """
    dgate, dup = torch.empty_like(grad), torch.empty_like(grad)
    tensors = grad, gate, up, dgate, dup
    library().lk_gated_backward(*map(pointer, tensors), grad.numel(), kind, gate.dtype == torch.bfloat16)
    return dgate, dup


def rms_norm(x: Tensor, weight: Tensor, eps: float, more: float) -> tuple[Tensor, Tensor]:
    """Compute s·x·(weight + more) with s = (mean(x²) + eps)^(-½).

    Args:
        x: fp32 [..., d].
        weight: fp32 [d].
        eps: Added to the mean square.
        more: Added to the weight.

    Returns:
        The normalized rows [..., d], and s [..., 1].
    """
    y, s = transient_empty(x, *x.shape), x.new_empty((*x.shape[:-1], 1))
    tensors = x, weight, y, s
    library().lk_rms_norm(*map(pointer, tensors), s.numel(), x.shape[-1], eps, more)
    return y, s


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, s: Tensor, more: float) -> Tensor:
    """Compute the gradient to x of :func:`rms_norm`.

    Args:
        grad: fp32 [..., d].
        x: As for :func:`rms_norm`.
        weight: As for :func:`rms_norm`.
        s: The second result of :func:`rms_norm`.
        more: As for :func:`rms_norm`.
    """
    dx = torch.empty_like(x)
    tensors = grad, x, weight, s, dx
    library().lk_rms_norm_backward(*map(pointer, tensors), s.numel(), x.shape[-1], more)
    return dx


def rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Rotate x by the angles of its positions, or compute the gradient of that.

    Args:
        x: fp32 [tokens, heads, d].
        cos: fp32 [tokens, d].
        sin: fp32 [tokens, d].
        backward: Compute the gradient, with x the gradient to the result.
    """
    y = torch.empty_like(x)
    tokens, heads, width = x.shape
    tensors = x, cos, sin, y
    library().lk_rotary(*map(pointer, tensors), tokens, heads, width // 2, backward)
    return y


def dropout(x: Tensor, y: Tensor | None, levels: int, scale: float, low: int, high: int) -> Tensor:
    """Compute x·mask·scale, or add it to y in place.

    Args:
        x: fp32, any shape.
        y: fp32, of that shape, or None.
        levels: Dropout probability times 2¹⁶.
        scale: Factor of the values that stay.
        low: The lower 32 bits of the seed that draws the mask.
        high: The upper 32 bits.
    """
    to = transient_empty(x, *x.shape) if y is None else y
    library().lk_dropout(pointer(x), pointer(to), x.numel(), low, high, levels, scale, y is not None)
    return to


def cross_entropy(z: Tensor, targets: Tensor, scale: float, gradient: bool) -> Tensor:
    """Compute the cross-entropy of each row.

    Args:
        z: Logits before ``scale``, fp32 [n, v].
        targets: int64 [n], in 0…v − 1.
        scale: Factor of the logits, positive.
        gradient: Overwrite z by the gradient to it.

    Returns:
        Losses, fp32 [n].
    """
    losses = z.new_empty(len(z))
    tensors = z, targets, losses
    library().lk_cross_entropy(*map(pointer, tensors), *z.shape, scale, gradient)
    return losses
