"""W + L·R in place of a weight: products with it never form the sum; other operations get the dense weight.

    x·(W + L·R)ᵀ = x·Wᵀ + (x·Rᵀ)·Lᵀ          for F.linear, matmul, the batched and the grouped product alike

Why an object that poses as a tensor: transformers stores the experts of a layer as one parameter. Three functions read it (an
eager loop, a grouped and a batched product), without a hook around the product. Wrapping the module would
copy their code for each architecture. torch calls ``__torch_function__`` of any argument first, so these functions compute
with the factors unchanged. Seen with transformers 5.18: they use ``F.linear``, ``torch.bmm`` and ``_grouped_mm``, indexing by
int64, and the attributes in ``_SHAPES``; ``test_experts_of_transformers_compute_with_the_factors`` fails if that changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

#: Attributes that are answered from W, without forming the sum.
_SHAPES = ("shape", "ndim", "dtype", "device", "dim", "size", "numel", "data_ptr", "is_cuda", "is_meta", "layout")
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


class LowRankWeight:
    """W [..., m, n] + L [..., m, r] · R [..., r, n]; L and R in one dtype, which may be wider than that of W."""

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self.weight, self.left, self.right = weight, left, right

    def dense(self) -> Tensor:
        """Compute W + L·R, rounded once to the dtype of W."""
        return (self.weight + self.left @ self.right).to(self.weight.dtype)

    def transpose(self, one: int, other: int) -> LowRankWeight | Tensor:
        """Transpose as a tensor does; still W + L·R if the last two dimensions are swapped, else dense."""
        last, swapped = self.weight.ndim, {one % self.weight.ndim, other % self.weight.ndim}
        if swapped != {last - 2, last - 1}:
            return self.dense().transpose(one, other)
        return LowRankWeight(self.weight.mT, self.right.mT, self.left.mT)

    @property
    def mT(self) -> LowRankWeight | Tensor:  # noqa: N802 (as a tensor calls it)
        """The last two dimensions swapped."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> LowRankWeight | Tensor:  # noqa: N802
        """The transpose of a matrix."""
        return self.mT if self.weight.ndim == 2 else self.dense().T

    def __getitem__(self, index: Any) -> LowRankWeight | Tensor:
        experts = isinstance(index, int | slice) or (isinstance(index, Tensor) and index.dtype == torch.int64)
        if self.weight.ndim == 2 or not experts:
            return self.dense()[index]
        return LowRankWeight(self.weight[index], self.left[index], self.right[index])

    def __len__(self) -> int:
        return len(self.weight)

    def __matmul__(self, other: Any) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight if name in _SHAPES else self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = _product(func, args, kwargs)
        if product is None:
            args, kwargs = tree_map(lambda value: value.dense() if isinstance(value, cls) else value, (args, kwargs))
            return func(*args, **kwargs)
        h, update = product
        return (h + update).to(h.dtype)  # a half-precision base beside an fp32 adapter: rounded once


def _through_dense(operator: str) -> Callable[..., Any]:
    return lambda both, *others: getattr(both.dense(), operator)(*others)


for _operator in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "pow"):
    setattr(LowRankWeight, f"__{_operator}__", _through_dense(f"__{_operator}__"))


def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the products with W and with L·R, if ``func`` is a product with one such weight; else None."""
    name = getattr(func, "__name__", "")
    if len(args) < 2 or sum(isinstance(value, LowRankWeight) for value in tree_leaves((args, kwargs))) != 1:
        return None
    x, m = args[:2]
    if isinstance(x, LowRankWeight) and name in ("matmul", "bmm", "mm"):
        right = func(x.right, m.to(x.right.dtype))  # [..., r, n]
        return func(x.weight, m), func(x.left, right)
    if not isinstance(m, LowRankWeight):
        return None
    wide = x.to(m.left.dtype)
    if name in ("matmul", "bmm", "mm"):
        return func(x, m.weight), func(func(wide, m.left), m.right)
    if name == "linear":
        return func(x, m.weight, *args[2:], **kwargs), F.linear(F.linear(wide, m.right), m.left)
    if name in _GROUPED and m.weight.ndim == 3 and kwargs.get("bias") is None and kwargs.get("out_dtype") is None:
        left, right = _aligned(m.left, m.right)
        thin = func(wide, left, *args[2:], **kwargs)
        return func(x, m.weight, *args[2:], **kwargs), func(thin, right, *args[2:], **kwargs)
    return None


def _aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Pad the rank with zeros to a multiple of 16 bytes, as grouped products require."""
    missing = -left.shape[-1] % (16 // left.element_size())
    return (F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))) if missing else (left, right)
