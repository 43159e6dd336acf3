"""MiCA: B is the minor directions of the weight and stays frozen, A begins as zero and is trained (arXiv:2604.01694).

    A = 0        B = the left singular vectors of the r smallest singular values of W

So the update is confined to output directions that the base hardly uses. At the start B·A = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.lora.initialization.taken_part import one_thread

#: The setting's value.
MICA = "mica"


@torch.no_grad()
def initialize_minor(lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> None:
    """Initialize A [r, in] and B [out, r] in place from a weight [out, in]; tensors on the meta device are left alone."""
    if lora_A.is_meta or weight.is_meta:
        return
    with one_thread():
        u, _, _ = torch.linalg.svd(weight, full_matrices=False)
    lora_B.copy_(u[:, -len(lora_A) :])
    lora_A.zero_()
