"""The 8-bit product on NVIDIA GPUs, in Triton.

    h  = (diag(a)·x₈·W₈ᵀ + x[:, c]·W₈[:, c]ᵀ)·diag(s) + b + u·vᵀ
    ∂x = diag(a)·(g·diag(s))₈·W₈ + u·vᵀ

x₈ is x rounded to int8 by one scale a for each row, without the outlier columns c, which are multiplied as they are (the
split of LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 3.2, with outliers known by the tensor's own size); the
gradient to the input is an int8 product too (SwitchBack, Wortsman et al. 2023, arXiv:2304.13013), with the weight's scales
folded into g before it is rounded. u·vᵀ is a low-rank part, LoRA's own.

Nothing waits for the GPU and shapes are static: there are always :data:`SLOTS` columns c, those not needed being zeros.
Three small kernels read x (column maxima, the choice of c, rounding), one multiplies; all that is added or rescaled is, in
the epilogue of that one, while the sum is in registers. Interpreted (``TRITON_INTERPRET=1`` before the first import of
Triton) all of it runs on a CPU too, slowly.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import LorakeetError
from lorakeet.kernels.int8.format import dequantize, quantize_rows

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore

    from lorakeet.kernels.int8 import triton_kernels as kernels
except ImportError:  # available() tells
    triton = None

#: A column of x with a value above so many times x's root mean square is multiplied as it is.
OUTLIER = 8.0
#: At most so many outlier columns, and no more than 1/16 of all.
SLOTS = 32
#: Values that one program holds at most; what is longer takes several passes.
HELD = 16384

#: From so many rows on the input gradient makes a transposed copy of the weight, int8 and for the moment. Tensor cores want
#: both factors in order of the summed dimension; without the copy the same bytes change places for every block of rows.
TURN_FROM = 128

#: u [n, r] and v [width of the product, r], any strides, any floating dtypes.
Low = tuple[Tensor, Tensor]
#: What :func:`split_columns` finds: int32 [SLOTS + 1] and int8 [in].
Split = tuple[Tensor, Tensor]


def available(device: torch.device) -> tuple[bool, str]:
    """Whether this file can multiply on ``device``: with what, or why not."""
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


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, low: Low | None = None) -> Tensor:
    """h = x·W₈ᵀ·diag(s) + b + u·vᵀ.

    Args:
        x: [n, in] in fp32, bf16 or fp16, any strides.
        weight: int8 [out, in].
        scale: fp32 [out].
        bias: [out] or None.
        low: u [n, r] and v [out, r], or None.

    Returns:
        [n, out] in x's dtype. A row of x with NaN or infinity in it gives a row that is not finite.
    """
    h = _place(x, weight, low)
    if h.numel():
        with torch.cuda.device_of(x):
            split = split_columns(x)
            rounded, row_scale, apart = quantize_activations(x, split=split)
            picked = None if split is None else weight.index_select(1, split[0][:SLOTS])  # [out, SLOTS]
            _launch(h, rounded, row_scale, weight, scale, bias, apart, picked, low)
    return h


def input_gradient(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """∂x = (g·diag(s))·W₈ for g [n, out]; [n, in] in g's dtype."""
    dx = _place(g, weight.T, None)
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
    """The transpose of a contiguous int8 [out, in] in memory of its own; 4 divides both sizes."""
    height, width = weight.shape[0] // 4, weight.shape[1] // 4
    turned = weight.new_empty(4 * width, 4 * height)
    grid = triton.cdiv(height, 32), triton.cdiv(width, 32)
    kernels.turn[grid](weight.view(torch.int32), turned.view(torch.int32), height, width, BLOCK=32)
    return turned


def split_columns(x: Tensor) -> Split | None:
    """Which columns of x [n, in] are multiplied apart; None if x is too narrow for any.

    Returns:
        int32 [SLOTS + 1]: their numbers, 0 in each slot not needed, last how many are needed; int8 [in]: 0 for them, or 1.
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
        int8 [n, in], with zeros for the columns in ``split``; fp32 [n], 1 for a row of zeros; those columns as they are,
        [n, SLOTS] in x's dtype.
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


def _place(x: Tensor, w: Tensor, low: Low | None) -> Tensor:
    """Where x·wᵀ goes. Shapes that do not fit end here: a kernel would read what is not its own."""
    rank = low[0].shape[1:] if low else ()
    fits = x.ndim == 2 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fits = fits and w.dtype == torch.int8 and w.shape[1:] == x.shape[1:]
    if not fits or (low and (low[0].shape != (len(x), *rank) or low[1].shape != (len(w), *rank))):
        got = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (x, w, *(low or ())))
        raise LorakeetError(f"an 8-bit product of {got}: expected floating [n, k], int8 [m, k], and [n, r], [m, r]")
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
    low: Low | None,
) -> None:
    """out = (row_scale·a·wᵀ + apart·pickedᵀ)·column_scale + bias + low; a int8 [n, inner], w int8 [width, inner]."""
    (n, inner), width = a.shape, len(w)
    u, v = low or (None, None)
    rank, strides = (low[0].shape[1], (*low[0].stride(), *low[1].stride())) if low else (0, (0, 0, 0, 0))
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
    """What the tensor cores multiply; the interpreter has no bf16."""
    return tl.float32 if kernels.INTERPRETED else getattr(tl, str(t.dtype).removeprefix("torch."))


# -- slow truths ------------------------------------------------------------------------------------------------------


def split_columns_reference(x: Tensor) -> Tensor:
    """Numbers of the columns of x [n, in] that are multiplied apart, in order, int64 [at most SLOTS]."""
    most, largest = min(SLOTS, x.shape[1] // 16), x.abs().amax(0).float()
    least = OUTLIER * x.double().square().mean().sqrt().float()
    if int((largest > least).sum()) > most:
        least = largest.sort(descending=True).values[most]
    return (largest > least).nonzero()[:, 0]


def product_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, low: Low | None = None
) -> Tensor:
    """What :func:`product` computes, in fp64 after the rounding, n > 0."""
    columns, inner, wide = split_columns_reference(x), x.clone(), dequantize(weight, scale, torch.float64)
    inner[:, columns] = 0
    rounded, row_scale = quantize_rows(inner)
    h = (rounded.double() * row_scale.double()[:, None]) @ wide.T + x[:, columns].double() @ wide[:, columns].T
    h = h if bias is None else h + bias.double()
    return h if low is None else h + low[0].double() @ low[1].double().T


def input_gradient_reference(g: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """What :func:`input_gradient` computes, in fp64 after the rounding."""
    rounded, row_scale = quantize_rows(g.float() * scale)
    return (rounded.double() * row_scale.double()[:, None]) @ weight.double()
