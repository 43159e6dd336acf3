"""Norm of each output channel of W + s·B·A, without that matrix.

    ‖w_o + s·b_o·A‖² = ‖w_o‖² + 2s·⟨w_o·Aᵀ, b_o⟩ + s²·⟨b_o·(A·Aᵀ), b_o⟩        w_o, b_o: rows of W and B

W is read once, in blocks of rows as it is stored, so a weight in 8 bits is never dense as a whole. The products have the
width of the rank. The error is that of the sum of squares, about 1e-7 of ‖w_o‖² + s²·‖b_o·A‖² in fp32. So it is visible only
in a row that the update nearly cancels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lorakeet.kernels.cpu.ordered_product import low_rank_gradient, low_rank_tokens


def channel_norms_reference(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Compute the reference: the norm of each row of the dense sum.

    Args:
        weight: W [out, in].
        lora_A: [r, in].
        lora_B: [out, r].
        scaling: s above.

    Returns:
        [out].
    """
    return torch.linalg.vector_norm(weight + scaling * (lora_B @ lora_A), dim=1)


@torch.no_grad()
def channel_norms(
    blocks: Iterable[Tensor], lora_A: Tensor, lora_B: Tensor, scaling: float, channel_dim: int = 0
) -> Tensor:
    """Compute the norm of each output channel of W + s·B·A.

    Args:
        blocks: The stored weight in blocks of rows: [rows, in] each, or [rows, out] with ``channel_dim`` 1.
        lora_A: [r, in], in the dtype of the blocks.
        lora_B: [out, r].
        scaling: s above.
        channel_dim: Dimension of the stored weight that counts output channels.

    Returns:
        [out], at least the smallest positive number, so that a channel of zeros can be divided by it.
    """
    squares, crosses, inputs = [], [], 0
    for block in blocks:
        squares.append(torch.linalg.vector_norm(block, dim=1 - channel_dim).square())
        if channel_dim == 0:
            crosses.append(low_rank_tokens(block, lora_A.T))  # [rows, r]
        else:
            part = lora_A[:, inputs : inputs + len(block)].T  # [rows, r]
            crosses.append(low_rank_gradient(part, block).T)  # [out, r]
            inputs += len(block)
    join = torch.cat if channel_dim == 0 else _sum
    total = join(squares) + 2 * scaling * (join(crosses) * lora_B).sum(1)
    total += scaling**2 * ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(1)
    return total.clamp_(min=0).sqrt_().clamp_(min=torch.finfo(total.dtype).tiny)


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
