"""OLoRA: the first directions of a QR decomposition of the weight are trained, the rest of it is frozen.

Büyükakyüz 2024 (arXiv:2406.01775), section 3.2, with W = Q·R:

    A = R_r        B = Q_r        W_res = W − s·B·A

where Q_r are the first r columns of Q, and R_r the first r rows of R. B is orthonormal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_pair(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] of a weight [out, in]."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]
