"""References of the 8-bit products on a CPU: plain torch that the tests hold every back end against.

The references of the Triton kernels are beside them, in :mod:`lorakeet.kernels.int8.triton`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.cpu.abi import FEEDBACK, GROUP
from lorakeet.kernels.int8.format import dequantize, outlier_columns, split_scale


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by the dequantized weight: the reference of ``blocked``, differentiated by autograd.

    Args:
        x: [..., in], any floating dtype.
        weight: int8 [out, in].
        scale: fp32, as :mod:`lorakeet.kernels.int8.format` describes it.
        bias: [out] or None.
    """
    return F.linear(x, dequantize(weight, scale, x.dtype), bias)


def rounded_groups(x: Tensor, error_feedback: bool = False) -> Tensor:
    """Round each run of :data:`GROUP` columns of a row to int8 by its largest magnitude, and return the rounded values.

    Args:
        x: fp32 [n, columns].
        error_feedback: Add the rounding error of a value to the one :data:`FEEDBACK` columns further on, before that one is
            rounded.

    Returns:
        fp32 [n, columns].
    """
    groups = F.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP // FEEDBACK, FEEDBACK).clone()
    made, error = torch.empty_like(groups), x.new_zeros(len(x), FEEDBACK)
    for group, to in zip(groups.unbind(1), made.unbind(1), strict=True):
        if error_feedback:
            group[:, 0] += error
        largest = group.abs().amax((1, 2)).unsqueeze(1)
        scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
        for at in range(GROUP // FEEDBACK):
            value = group[:, at] + error if error_feedback and at else group[:, at]
            to[:, at] = (value * (127 / largest)).nan_to_num(0).round().clamp(-127, 127) * scale
            error = value - to[:, at]
    return made.view(len(x), -1)[:, : x.shape[1]]


def vnni_gradient_reference(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute the input gradient of ``vnni`` for g fp32 [n, out]: rounded by groups, then multiplied in fp64."""
    row_scale, column_scale = split_scale(weight, scale)
    dx = rounded_groups(g * row_scale, error_feedback=column_scale is None).double() @ weight.double()
    dx = (dx if column_scale is None else dx * column_scale).to(g.dtype)
    outliers = outlier_columns(weight, scale)
    return dx if outliers is None else dx.index_copy(1, outliers[0].long(), g @ outliers[1].T)
