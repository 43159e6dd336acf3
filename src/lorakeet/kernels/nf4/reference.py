"""Reference of the 4-bit products: the dequantized weight and plain torch, which the tests hold every path against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.nf4.format import Nf4Tensors, dequantize


def nf4_linear_reference(x: Tensor, weight: Nf4Tensors, bias: Tensor | None = None) -> Tensor:
    """Multiply by the dequantized weight, differentiated by autograd.

    Args:
        x: [..., in], any floating dtype.
        weight: [out, in] in four bits.
        bias: [out] or None.
    """
    return F.linear(x, dequantize(weight, x.dtype), bias)
