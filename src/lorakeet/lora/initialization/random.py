"""Random initializations: B·A = 0, so that the model answers as its base at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Divisor of the entries of an orthogonal A and B, which keeps them small.
_ORTHOGONAL_DIVISOR = 10.0


def initialize_pair(lora_A: Tensor, lora_B: Tensor, how: bool | str, r: int) -> None:
    """Initialize A [r, in] and B [out, r] in place.

    Args:
        lora_A: Kaiming-uniform with a = √5, or normal with standard deviation 1/r for ``"gaussian"``.
        lora_B: Zero; Kaiming-uniform for ``False``, so that a test sees a change.
        how: The setting ``init_lora_weights``; see :func:`initialize_orthogonal` for ``"orthogonal"``.
        r: The rank.
    """
    if how == "orthogonal":
        initialize_orthogonal(lora_A, lora_B, r)
        return
    if how == "gaussian":
        nn.init.normal_(lora_A, std=1 / r)
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


@torch.no_grad()
def initialize_orthogonal(lora_A: Tensor, lora_B: Tensor, r: int) -> None:
    """Initialize A = Q₁ᵀ·N₁ and B = N₂·Q₂, where Q₁ and Q₂ are the odd and even rows of a random orthogonal matrix.

    N₁ [r/2, in] and N₂ [out, r/2] are normal with standard deviation 0.1. Since Q₂·Q₁ᵀ = 0, B·A = 0, although both
    have values and so a gradient from the first step on.
    """
    q, _ = torch.linalg.qr(torch.randn(r, r))
    first = torch.randn(lora_A.shape[1], r // 2) @ q[0::2]  # [in, r]
    second = torch.randn(r // 2, lora_B.shape[0]).T @ q[1::2]  # [out, r]
    lora_A.copy_(first.T / _ORTHOGONAL_DIVISOR)
    lora_B.copy_(second / _ORTHOGONAL_DIVISOR)
