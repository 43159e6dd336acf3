"""The 4-bit product on NVIDIA GPUs, in Triton: a tile of the weight is looked up and scaled in registers, and multiplied.

    h = x·Wᵀ + b          ∂x = g·W

Nothing is rounded but the weight, and its values to the dtype of x. The reference is
:func:`lorakeet.kernels.nf4.reference.nf4_linear_reference`. Interpreted (``TRITON_INTERPRET=1`` before the first import of
Triton), everything runs on a CPU too, slowly.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.nf4.format import BLOCK, VALUES, Nf4Tensors, is_readable

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore

    from lorakeet.kernels.nf4 import triton_kernels as kernels
except ImportError:  # available() reports it
    triton = None

#: Tokens. Up to this number a tile has 16 rows, else 64.
FEW = 16


def supports(x: Tensor, weight: Nf4Tensors, width: int) -> bool:
    """Whether the kernels can multiply x [n, width] and a weight: on a GPU that they run on, in a dtype that they know."""
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[1] == width and is_readable(weight)
    return fits and all(t.is_contiguous() for t in weight[:3] if t is not None) and _runs_on(x.device)


def _runs_on(device: torch.device) -> bool:
    """Whether Triton is there and compiles for a device, a GPU with tensor cores for bf16; interpreted, on all."""
    if triton is None or torch.version.hip:
        return False
    return kernels.INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


def product(x: Tensor, weight: Nf4Tensors, bias: Tensor | None = None) -> Tensor:
    """Compute h = x·Wᵀ + b.

    Args:
        x: [n, in], any strides.
        weight: [out, in] in four bits.
        bias: [out] or None.

    Returns:
        [n, out] in x's dtype.
    """
    out, inner = weight.shape
    h = x.new_empty(len(x), out)
    if h.numel():
        rows = 16 if len(x) <= FEW else 64
        with torch.cuda.device_of(x):
            kernels.multiply[triton.cdiv(len(x), rows), triton.cdiv(out, 64)](
                *(x, *weight[:3], _table(x.device), bias, h, len(x), out, inner, *x.stride()),
                BLOCK_M=rows,
                BLOCK_N=64,
                KIND=_kind(x),
            )
    return h


def input_gradient(g: Tensor, weight: Nf4Tensors) -> Tensor:
    """Compute ∂x = g·W for g [n, out]; [n, in] in g's dtype."""
    out, inner = weight.shape
    dx = g.new_empty(len(g), inner)
    if dx.numel():
        rows = 16 if len(g) <= FEW else 64
        with torch.cuda.device_of(g):
            kernels.multiply_back[triton.cdiv(len(g), rows), inner // BLOCK](
                *(g, *weight[:3], _table(g.device), dx, len(g), out, inner, *g.stride()),
                BLOCK_M=rows,
                BLOCK_K=64,
                KIND=_kind(g),
            )
    return dx


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(VALUES, device=device)


def _kind(t: Tensor) -> Any:
    """Return the dtype that the tensor cores multiply; the interpreter has no bf16."""
    return tl.float32 if kernels.INTERPRETED else getattr(tl, str(t.dtype).removeprefix("torch."))
