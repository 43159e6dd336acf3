"""The int8 format of a frozen weight: W₀ ≈ diag(s)·W₈·diag(c), and how it is made.

W₈ is int8 [out, in], with a row scale s for each output channel. For a finer rounding it has a column scale c for each input
channel too. Column scales balance the columns of the weight: a column of small values, which usually meets large
activations, is
not rounded with the step of the others. x·diag(c) is flatter than x for the same reason. They are powers of two, so
multiplying by them is exact.

Some weights narrow (in > out), as the last layer of a feed-forward block does. The columns of their largest values are
outlier
columns and stay fp32. A few weights there make the activations of a text's first token some thousand times larger than all
others, and remove them again. They are the super weights of Yu et al. 2024 ("The Super Weight in Large Language Models",
arXiv:2411.07191). Rounded, an outlier column does more harm than all others together. It has c = 0, and x times its
fp32 values is added.

All numbers that belong to a weight's bytes are one fp32 vector ``scale``: s [out]; or s, c [out + in]; or s, c, the values of
the outlier columns and their positions [out + in + OUTLIERS·(out + 1)].
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rounds of balancing rows and columns in turn.
BALANCE_ROUNDS = 4
#: Largest exponent of a column's scale, which is a power of two.
BALANCE_MAX_EXPONENT = 12
#: Outlier columns of a weight that narrows.
OUTLIERS = 2


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 by its largest magnitude.

    Args:
        x: [rows, columns], any floating dtype, finite.

    Returns:
        int8 [rows, columns] in −127…127, and fp32 [rows] with x ≈ scale·int8; a row of zeros has the scale 1.
    """
    largest = x.abs().amax(1, keepdim=True).float() if x.shape[1] else x.new_zeros(len(x), 1, dtype=torch.float32)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)  # NaN stays NaN
    scaled = x / scale.to(x.dtype) if x.dtype == torch.float32 else x.float() / scale
    return scaled.round_().to(torch.int8), scale[:, 0]


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight after balancing its columns, except the outlier columns.

    The method is SINQ (Müller et al. 2025, arXiv:2509.22944) with one pair of scales for the whole weight, and powers of two
    for its columns.

    Args:
        weight: [out, in], any floating dtype, finite.

    Returns:
        int8 [out, in] in −127…127, and ``scale``, fp32 [:func:`scale_size`], as the top of this module describes it.
    """
    weight = weight.float()
    if scale_size(*weight.shape) == sum(weight.shape):
        column_scale = balance_columns(weight)
        rounded, row_scale = quantize_rows(weight / column_scale)
        return rounded, torch.cat((row_scale, column_scale))
    positions = weight.abs().amax(0).topk(OUTLIERS).indices.sort().values
    rest = weight.index_fill(1, positions, 0)
    column_scale = balance_columns(rest)
    rounded, row_scale = quantize_rows(rest / column_scale)
    values = weight[:, positions].T.flatten()
    return rounded, torch.cat((row_scale, column_scale.index_fill(0, positions, 0), values, positions))


def scale_size(out: int, inner: int) -> int:
    """Return the length of ``scale`` for a weight [out, in]; the weight of a vocabulary has [out] only."""
    return out + inner + (OUTLIERS * (out + 1) if inner > max(out, OUTLIERS) and out else 0)


def balance_columns(weight: Tensor) -> Tensor:
    """Compute column scales, fp32 [in], powers of two: divided by them, the columns have nearly one size.

    It is the iteration of Sinkhorn and Knopp on squares, so rows that differ in size do not decide the columns' sizes.
    """
    largest = weight.abs().amax().float() if weight.numel() else torch.ones(())
    squares = (weight.float() / largest.clamp_min(torch.finfo(torch.float32).tiny)).square_()
    least, columns = 1e-30, torch.ones(weight.shape[1], device=weight.device)
    for _ in range(BALANCE_ROUNDS):
        rows = squares @ columns.reciprocal()
        columns = torch.where(rows > least, rows, torch.inf).reciprocal() @ squares
        columns = torch.where(columns > least, columns, columns.mean().clamp_min(least))
    exponents = columns.log2() / 2
    return (exponents - exponents.mean()).round_().clamp_(-BALANCE_MAX_EXPONENT, BALANCE_MAX_EXPONENT).exp2_()


def split_scale(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return row_scale [out] and column_scale [in] or None.

    A scale of the wrong length is returned unchanged as row_scale; the caller raises on its shape.
    """
    out, inner = weight.shape
    if scale.shape[0] not in (out + inner, scale_size(out, inner)):
        return scale, None
    return scale[:out], scale[out : out + inner]


def outlier_columns(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the outlier columns' positions, fp32 [OUTLIERS], and values, fp32 [OUTLIERS, out]; None without any."""
    out, inner = weight.shape
    if scale.shape[0] == out + inner or scale.shape[0] != scale_size(out, inner):
        return None
    return scale[-OUTLIERS:], scale[out + inner : -OUTLIERS].view(OUTLIERS, out)


def dequantize(
    weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, at: Tensor | slice = slice(None)
) -> Tensor:
    """Return the weight in a floating dtype, for checks and merging; products never form it.

    Args:
        weight: int8 [out, in].
        scale: As the top of this module describes it.
        dtype: Of the result.
        at: Output channels, as an index; all by default.

    Returns:
        [out, in], or the output channels ``at``.
    """
    row_scale, column_scale = split_scale(weight, scale)
    wide = weight[at].float() * row_scale[at].unsqueeze(1)
    if column_scale is not None:
        wide = wide.mul_(column_scale)
    if outliers := outlier_columns(weight, scale):
        positions, values = outliers
        wide.index_copy_(1, positions.long(), values[:, at].T)
    return wide.to(dtype)


def rounding_steps(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the distance of the values that each number can be rounded to, fp32 [out, in]; 0 in an outlier column."""
    row_scale, column_scale = split_scale(weight, scale)
    if column_scale is None:
        return row_scale.unsqueeze(1).expand_as(weight)
    return row_scale.unsqueeze(1) * column_scale
