"""fp32 products on a CPU whose sums have one order, which depends on shapes alone and not on the number of threads.

torch's libraries choose blocks by the number of threads, so the last bits of a product may depend on it. ``gemm_f32.c``
shares whole tiles of the result among threads, and each sum runs over the depth in fixed blocks. Where it cannot multiply,
torch does.
"""

from __future__ import annotations

from torch import Tensor

from lorakeet.kernels.cpu import bindings, features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.gemm import GEMV_TOKENS


def ordered_product(a: Tensor, b: Tensor, bias: Tensor | None = None, low_rank: bool = False) -> Tensor | None:
    """Compute a·b + bias without autograd.

    Args:
        a: [n, k].
        b: [k, columns].
        bias: [columns] or None.
        low_rank: Sum in the blocks of a product with an adapter's A or B.

    Returns:
        fp32 [n, columns]; None where C cannot multiply these.
    """
    if not (is_ordered(a, b) and bindings.is_fp32_vector(b.shape[1], bias)):
        return None
    if bias is not None and not bindings.supports(bias):
        return None
    return gemm.gemm_f32(a.contiguous(), _readable(b), bias, low_rank)


def is_ordered(a: Tensor, b: Tensor) -> bool:
    """Whether ``gemm_f32.c`` can multiply two matrices, or contiguous copies of them: fp32, on a CPU with AVX2."""
    fit = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]
    return fit and features.has(Feature.AVX2) and bindings.is_plain_fp32(a) and bindings.is_plain_fp32(b)


def _readable(m: Tensor) -> Tensor:
    return m if m.is_contiguous() or m.mT.is_contiguous() else m.contiguous()


def low_rank_tokens(x: Tensor, m: Tensor) -> Tensor:
    """Compute x·m for tokens x [n, k] and an adapter's m [k, columns], without autograd."""
    made = None if x.shape[0] <= GEMV_TOKENS else ordered_product(x, m, low_rank=True)
    return x @ m if made is None else made


def low_rank_gradient(thin: Tensor, wide: Tensor) -> Tensor:
    """Compute thinᵀ·wide for thin [n, r] and wide [n, columns], without autograd."""
    made = ordered_product(thin.T, wide, low_rank=True)
    return thin.T @ wide if made is None else made


def add_low_rank_(h: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Add u·v to h in place, without autograd; h [n, columns], u [n, r] and v [r, columns] of one dtype."""
    if u.shape[0] > GEMV_TOKENS and is_ordered(u, v) and bindings.supports(h):
        return gemm.gemm_f32(u.contiguous(), _readable(v), low_rank=True, add_to=h)
    return h.addmm_(u, v)
