"""The loss of a frozen fp32 head and its gradient to the input, in C (``csrc/head/head_f32.c``)."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.cpu.bindings import pointer
from lorakeet.kernels.cpu.build import library
from lorakeet.kernels.cpu.features import Feature, has
from lorakeet.kernels.cpu.gemm import GEMV_TOKENS

#: Tokens of a chunk are a multiple of this: whole panels (``NR`` in ``gemm_tiles.h``) on every processor.
TOKEN_STEP = 32


def supports_head(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`head_f32` can read these: many fp32 tokens x [n, hidden] and a weight [vocabulary, hidden]."""
    fit = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and x.shape[0] > GEMV_TOKENS
    return fit and has(Feature.AVX2) and bindings.supports(x, weight)


def head_f32(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, tokens: int, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute log Σ exp(s·z) - s·z_target for each token, with z = x·Wᵀ, without autograd.

    Args:
        x: fp32 [n, hidden], contiguous.
        weight: W, fp32 [vocabulary, hidden], contiguous.
        targets: int64 [n], in 0…vocabulary - 1.
        scale: s, positive.
        tokens: Largest number of tokens whose logits are in memory at a time.
        gradient: Compute the gradient to x.

    Returns:
        Losses, fp32 [n]; the gradient of their sum to x, or None.
    """
    n, (vocabulary, width) = x.shape[0], weight.shape
    chunks = -(-n // max(tokens // TOKEN_STEP * TOKEN_STEP, TOKEN_STEP))
    each = -(-n // (chunks * TOKEN_STEP)) * TOKEN_STEP
    losses, dx = x.new_empty(n), torch.empty_like(x) if gradient else None
    memory = x.new_empty(library().lk_head_f32_size(each, vocabulary, width))
    tensors = x, weight, targets, losses, dx, memory
    library().lk_head_f32(*map(pointer, tensors), n, vocabulary, width, each, scale)
    return losses, dx
