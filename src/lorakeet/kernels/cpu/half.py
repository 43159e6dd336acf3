"""Products in C of fp32 tokens with a weight that is stored in 16 bits, bf16 or fp16, and widened as it is read.

Widening is exact. The product of many tokens is that of :func:`~lorakeet.kernels.cpu.gemm.gemm_f32` with the widened weight,
to the bit. Callers check shapes and memory first, with :mod:`lorakeet.kernels.cpu.bindings`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.kernels.cpu.bindings import pointer
from lorakeet.kernels.cpu.build import library
from lorakeet.kernels.cpu.memory import transient_empty, workspace


def gemm_half(x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x·m + b for many tokens. The order of each sum is fixed: it depends on shapes alone.

    Args:
        x: fp32 [n, k], contiguous.
        m: bf16 or fp16 [k, columns]; m or mᵀ is contiguous.
        bias: fp32 [columns] or None.

    Returns:
        fp32 [n, columns].
    """
    h = transient_empty(x, x.shape[0], m.shape[1])
    strips = workspace(library().lk_packed_f32_size(x.shape[0]), torch.float32)
    tensors = x, m, bias, strips, h
    flags = not m.is_contiguous(), m.dtype == torch.bfloat16
    library().lk_gemm_half(*map(pointer, tensors), *x.shape, m.shape[1], *flags)
    return h


def gemm_half_amx(x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x·m + b for many tokens in tiles of AMX, with x in two planes of bf16: 16 bits of each value.

    Args:
        x: fp32 [n, k], contiguous.
        m: bf16 [k, columns]; m or mᵀ is contiguous.
        bias: fp32 [columns] or None.

    Returns:
        fp32 [n, columns].
    """
    h = transient_empty(x, x.shape[0], m.shape[1])
    tiles = workspace(library().lk_packed_half_amx_size(*x.shape), torch.int8)
    tensors = x, m, bias, tiles, h
    library().lk_gemm_half_amx(*map(pointer, tensors), *x.shape, m.shape[1], not m.is_contiguous())
    return h


def gemv_half(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute h = x·Wᵀ + b for few tokens; the weight is read once.

    Args:
        x: fp32 [n, in], contiguous.
        weight: W, bf16 or fp16 [out, in], contiguous.
        bias: b, fp32 [out], or None.

    Returns:
        fp32 [n, out].
    """
    (n, width), out = x.shape, weight.shape[0]
    h = x.new_empty(n, out)
    tensors = x, weight, bias, h
    library().lk_gemv_half(*map(pointer, tensors), n, out, width, weight.dtype == torch.bfloat16)
    return h
