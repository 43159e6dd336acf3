"""The 8-bit product on NVIDIA GPUs, in Triton.

    h  = (diag(a)·x₈·W₈ᵀ + x[:, c]·W₈[:, c]ᵀ)·diag(s) + b + u·vᵀ
    ∂x = diag(a)·(g·diag(s))₈·W₈ + u·vᵀ

x₈ is x rounded to int8 by one scale a for each row, without the outlier columns c of x, which keep their dtype. That is
the split
of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 3.2), with outliers found by the tensor's own size. The input
gradient is an int8 product too (SwitchBack, Wortsman et al. 2023, arXiv:2304.13013), with the weight's scales folded into g
before it is rounded. u·vᵀ is a low-rank product, LoRA's own.

Nothing synchronizes with the GPU, and shapes are static: there are always :data:`SLOTS` columns c, of which the unused
ones are
zeros. Three small kernels read x: column maxima, the choice of c, rounding. A fourth multiplies, and its epilogue adds and
rescales while the sum is in registers. Interpreted (``TRITON_INTERPRET=1`` before the first import of Triton),
everything runs on a CPU too, slowly.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import LorakeetError
from lorakeet.kernels.cpu.gemm import LowRank
from lorakeet.kernels.int8.format import dequantize, quantize_rows

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore

    from lorakeet.kernels.int8 import triton_kernels as kernels
except ImportError:  # available() reports it
    triton = None

#: Multiple of x's root mean square. A column of x with a larger value is an outlier, and is not rounded.
OUTLIER = 8.0
#: Outlier columns, at most; and at most 1/16 of all columns.
SLOTS = 32
#: Values that one program holds, at most; longer rows take several passes.
HELD = 16384

#: Rows. From this number on, the input gradient makes a transient transposed copy of the int8 weight. Tensor cores want both
#: factors contiguous in the summed dimension; without the copy, every block of rows transposes the same bytes again.
TURN_FROM = 128

#: Result of :func:`split_columns`: int32 [SLOTS + 1] and int8 [in].
Split = tuple[Tensor, Tensor]


def available(device: torch.device) -> tuple[bool, str]:
    """Whether these kernels run on ``device``, and with what, or why not."""
    if triton is None:
        return False, "Triton 3.4 or newer is not installed"
    if kernels.INTERPRETED:
        return True, f"Triton {triton.__version__}, interpreted"
    if device.type != "cuda":
        return False, f"{device} is not an NVIDIA GPU"
    if torch.version.hip or not torch.cuda.is_available():
        return False, f"PyTorch {torch.__version__} sees no NVIDIA GPU"
    major, minor = _capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    return (True, f"Triton {triton.__version__} on {name}") if major >= 8 else (False, f"{name} is older than 8.0")


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# -- products, without autograd ---------------------------------------------------------------------------------------


def product(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """Compute h = x·W₈ᵀ·diag(s) + b + u·vᵀ.

    Args:
        x: [n, in] in fp32, bf16 or fp16, any strides.
        weight: int8 [out, in].
        scale: fp32 [out].
        bias: [out] or None.
        low_rank: u [n, r] and v [out, r], or None.

    Returns:
        [n, out] in x's dtype. A row of x with NaN or infinity gives a row that is not finite.
    """
    h = _empty_result(x, weight, low_rank)
    if h.numel():
        with torch.cuda.device_of(x):
            split = split_columns(x)
            rounded, row_scale, apart = quantize_activations(x, split=split)
            picked = None if split is None else weight.index_select(1, split[0][:SLOTS])  # [out, SLOTS]
            _launch(h, rounded, row_scale, weight, scale, bias, apart, picked, low_rank)
    return h


def input_gradient(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute ∂x = (g·diag(s))·W₈ for g [n, out]; [n, in] in g's dtype."""
    dx = _empty_result(g, weight.T, None)
    if dx.numel():
        with torch.cuda.device_of(g):
            rounded, row_scale, _ = quantize_activations(g, factor=scale)
            odd = (
                weight.shape[0] % 16 or weight.shape[1] % 4 or weight.storage_offset() % 4 or not weight.is_contiguous()
            )
            w = weight.T if odd or len(g) < TURN_FROM else turn(weight)
            _launch(dx, rounded, row_scale, w, None, None, None, None, None)
    return dx


def turn(weight: Tensor) -> Tensor:
    """Transpose a contiguous int8 [out, in] into new memory; 4 divides both sizes."""
    height, width = weight.shape[0] // 4, weight.shape[1] // 4
    turned = weight.new_empty(4 * width, 4 * height)
    grid = triton.cdiv(height, 32), triton.cdiv(width, 32)
    kernels.turn[grid](weight.view(torch.int32), turned.view(torch.int32), height, width, BLOCK=32)
    return turned


def split_columns(x: Tensor) -> Split | None:
    """Find the outlier columns of x [n, in]; None if x is too narrow for any.

    Returns:
        int32 [SLOTS + 1]: their numbers, 0 in each unused slot, and their count last. int8 [in]: 0 for them, 1 for the
        others.
    """
    (n, width), most = x.shape, min(SLOTS, x.shape[1] // 16)
    if not most:
        return None
    grid = triton.cdiv(n, 128), triton.cdiv(width, 256)
    top = torch.zeros(width, dtype=torch.int32, device=x.device)
    squares = top.new_empty(grid[0] * grid[1], dtype=torch.float32)
    columns, inside = top.new_empty(SLOTS + 1), top.new_empty(width, dtype=torch.int8)
    kernels.column_maxima[grid](x, *x.stride(), n, width, top, squares, ROWS=32, COLUMNS=256, STEPS=4)
    block = triton.next_power_of_2(width)
    kernels.choose_columns[(1,)](
        *(top, squares, len(squares), float(x.numel()), OUTLIER, width, columns, inside),
        WIDTH=block,
        PARTS=min(triton.next_power_of_2(len(squares)), HELD // 16),
        CHUNK=min(block, HELD // 4),
        MOST=most,
        S=SLOTS,
        num_warps=min(max(block // 512, 4), 32),
    )
    return columns, inside


def quantize_activations(
    x: Tensor, factor: Tensor | None = None, split: Split | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round x·diag(factor), x [n, in], to int8 by the largest value of each row, halves to even.

    Returns:
        int8 [n, in], with zeros for the columns in ``split``. Scales fp32 [n], 1 for a row of zeros. The columns in
        ``split``, not rounded, [n, SLOTS] in x's dtype.
    """
    n, width = x.shape
    rounded, scales = x.new_empty(n, width, dtype=torch.int8), x.new_empty(n, dtype=torch.float32)
    columns, inside = split or (None, None)
    apart = None if split is None else x.new_empty(n, SLOTS)
    block = min(max(triton.next_power_of_2(width), 16), HELD)
    rows = max(HELD // 4 // block, 1)  # short ones share a program
    if n:
        kernels.quantize_rows[(triton.cdiv(n, rows),)](
            *(x, *x.stride(), n, width, factor, inside, columns, rounded, scales, apart),
            ROWS=rows,
            BLOCK=block,
            WHOLE=width <= block,
            S=SLOTS,
            num_warps=min(max(block // 1024, 4), 16),
        )
    return rounded, scales, apart


def _empty_result(x: Tensor, w: Tensor, low_rank: LowRank | None) -> Tensor:
    """Allocate the result x·wᵀ. Shapes that do not fit raise here: a kernel would read beyond the tensors."""
    rank = low_rank[0].shape[1:] if low_rank else ()
    fits = x.ndim == 2 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fits = fits and w.dtype == torch.int8 and w.shape[1:] == x.shape[1:]
    if not fits or (low_rank and (low_rank[0].shape != (len(x), *rank) or low_rank[1].shape != (len(w), *rank))):
        got = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (x, w, *(low_rank or ())))
        raise LorakeetError(f"8-bit product of {got}: expected floating [n, k], int8 [m, k], and [n, r], [m, r]")
    return x.new_empty(len(x), len(w))


def _launch(
    out: Tensor,
    a: Tensor,
    row_scale: Tensor,
    w: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    apart: Tensor | None,
    picked: Tensor | None,
    low_rank: LowRank | None,
) -> None:
    """Compute out = (row_scale·a·wᵀ + apart·pickedᵀ)·column_scale + bias + u·vᵀ; a int8 [n, inner], w int8 [width, inner]."""
    (n, inner), width = a.shape, len(w)
    u, v = low_rank or (None, None)
    rank, strides = (
        (low_rank[0].shape[1], (*low_rank[0].stride(), *low_rank[1].stride())) if low_rank else (0, (0, 0, 0, 0))
    )
    aligned = inner > 0 and w.stride(1) == 1 and not (inner % 16 or w.stride(0) % 16 or w.data_ptr() % 16)
    tma = aligned and (kernels.INTERPRETED or _capability(a.device)[0] >= 9)
    block = [64, 64]  # the interpreter's; those of a GPU are tuned
    fixed = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 2}
    kernels.tuned_multiply[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),)](
        TensorDescriptor(a, list(a.shape), list(a.stride()), block) if tma else a,
        TensorDescriptor(w, list(w.shape), list(w.stride()), block) if tma else w,
        *(out, n, width, inner, min(max(triton.next_power_of_2(n), 16), 8192), *w.stride()),
        *(row_scale, column_scale, bias, apart, picked, u, v, rank, *strides),
        TMA=tma,
        EVEN=inner % 256 == 0,
        S=SLOTS,
        RANK=min(max(triton.next_power_of_2(rank), 16), 64),
        APART_KIND=_kind(out),
        LOW_KIND=_kind(out if u is None else u),
        **(fixed if kernels.tuned_multiply is kernels.multiply else {}),
    )


def _kind(t: Tensor) -> Any:
    """Return the dtype that the tensor cores multiply; the interpreter has no bf16."""
    return tl.float32 if kernels.INTERPRETED else getattr(tl, str(t.dtype).removeprefix("torch."))


# -- references -------------------------------------------------------------------------------------------------------


def split_columns_reference(x: Tensor) -> Tensor:
    """Return the numbers of the outlier columns of x [n, in], in order, int64 [at most SLOTS]."""
    most, largest = min(SLOTS, x.shape[1] // 16), x.abs().amax(0).float()
    least = OUTLIER * x.double().square().mean().sqrt().float()
    if int((largest > least).sum()) > most:
        least = largest.sort(descending=True).values[most]
    return (largest > least).nonzero()[:, 0]


def product_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """Compute the reference of :func:`product`, in fp64 after the rounding.

    Args:
        x: [n, in], n > 0.
        weight: int8 [out, in].
        scale: fp32 [out].
        bias: [out] or None.
        low_rank: u [n, r] and v [out, r], or None.
    """
    columns, inner, wide = split_columns_reference(x), x.clone(), dequantize(weight, scale, torch.float64)
    inner[:, columns] = 0
    rounded, row_scale = quantize_rows(inner)
    h = (rounded.double() * row_scale.double()[:, None]) @ wide.T + x[:, columns].double() @ wide[:, columns].T
    h = h if bias is None else h + bias.double()
    return h if low_rank is None else h + low_rank[0].double() @ low_rank[1].double().T


def input_gradient_reference(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute the reference of :func:`input_gradient`, in fp64 after the rounding."""
    rounded, row_scale = quantize_rows(g.float() * scale)
    return (rounded.double() * row_scale.double()[:, None]) @ weight.double()
