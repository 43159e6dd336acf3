"""Operations of torch on a CPU whose bits do not depend on the number of threads.

torch shares the work of an operation among threads, and three things then depend on their number: the order of a sum, the
blocks of a product, and which elements are at the edge of a share. The edge of a vectorized loop runs other code, which
rounds otherwise. Within :func:`fixed_order` the operations that were seen to differ are replaced: fp32 products by those of
``gemm_f32.c``, and the others by themselves in one thread, wherever shares would matter. All are rare in a training; what is
frequent there are loops in C, whose order is fixed.

Replacing kernels of torch's dispatcher is the only place that sees the operations of every model, forward and backward.
tests/kernels/test_fixed_order.py compares every operation of a training with one, two and three threads.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu.ordered_product import ordered_product

#: Elements. torch shares an elementwise operation or a full sum of more than this among threads.
GRAIN = 32768
#: Elements. A share of a multiple of this has no edge, in any dtype: two vectors of 64 bytes of bf16.
WHOLE = 64
#: Multiplications of a product that is run in one thread; a call of ``gemm_f32.c`` would cost more.
SMALL = 1 << 20

#: Elementwise operations whose edges differ.
ELEMENTWISE = (
    *(
        "elu",
        "elu_backward",
        "exp2",
        "gelu",
        "gelu_backward",
        "glu",
        "glu_backward",
        "logaddexp",
        "mish",
        "mish_backward",
    ),
    *(
        "mul.Tensor",
        "pow.Scalar",
        "pow.Tensor_Scalar",
        "pow.Tensor_Tensor",
        "rsqrt",
        "sigmoid",
        "sigmoid_backward",
        "silu",
    ),
    *("silu_backward", "sinh", "softplus", "softplus_backward", "softshrink", "softshrink_backward"),
)
#: Elementwise operations that differ in half precision only.
HALF_ONLY = ("mul.Tensor", "rsqrt", "softshrink")
#: Sums, and operations with a sum for each thread.
SUMS = (
    *("sum", "sum.dim_IntList", "mean", "mean.dim", "prod", "prod.dim_int", "dot", "vdot", "mv", "addmv", "_softmax"),
    *(
        "_softmax_backward_data",
        "_log_softmax",
        "_log_softmax_backward_data",
        "mse_loss",
        "smooth_l1_loss",
        "huber_loss",
    ),
    *("native_layer_norm_backward", "native_batch_norm", "native_batch_norm_backward", "native_group_norm"),
    *("native_group_norm_backward", "convolution", "convolution_backward", "_index_put_impl_"),
)
#: Products of many small matrices, as attention in plain torch has them.
BATCHED = ("bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_")

#: Attention of torch, forward and backward, and the place of the queries among its arguments.
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 0,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 1,
}
#: Queries. With fewer, the buffers of a thread begin within a vector, and products depend on where.
ALIGNED_QUERIES = 32

Kernel = Callable[..., Any]
_lock = threading.RLock()
#: Operations that are replaced now, each with the blocks that it is replaced in.
_depth: dict[str, int] = {}


@contextmanager
def fixed_order(half_precision: bool = False) -> Iterator[None]:
    """Let no operation of torch on a CPU depend on the number of threads, in the whole process, while this is active.

    Large products that ``gemm_f32.c`` cannot compute are excepted: half precision, fp64, and processors without AVX2.

    Args:
        half_precision: Replace the operations that differ in half precision only, too; their calls then take longer.
    """
    library = torch.library.Library("aten", "IMPL")
    names = [name for name in _REPLACEMENTS if half_precision or name not in HALF_ONLY]
    with _lock:
        for name in names:
            if not _depth.get(name):
                _replace(library, name)
            _depth[name] = _depth.get(name, 0) + 1
    try:
        yield
    finally:
        with _lock:
            for name in names:
                _depth[name] -= 1
            library._destroy()


def is_active() -> bool:
    """Whether :func:`fixed_order` is active."""
    return bool(_depth.get("mm"))


def _replace(library: torch.library.Library, name: str) -> None:
    kernel = _kernel(name)
    if kernel is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced
            library.impl(name, _REPLACEMENTS[name](kernel), "CPU", with_keyset=True)


def _kernel(name: str) -> Any:
    """Return torch's own kernel of an operation; None if this version has none."""
    for key in ("CPU", "CompositeExplicitAutograd"):
        try:
            return torch.library.get_kernel(f"aten::{name}", key)
        except (AttributeError, RuntimeError, ValueError):
            continue
    return None


# ---- in one thread ------------------------------------------------------------------------------------------------------


def _alone(kernel: Any, keyset: Any, args: Sequence[Any], settings: dict[str, Any]) -> Any:
    threads = torch.get_num_threads()
    if threads == 1:
        return kernel.call_boxed(keyset, *args, **settings)
    torch.set_num_threads(1)
    try:
        return kernel.call_boxed(keyset, *args, **settings)
    finally:
        torch.set_num_threads(threads)


def _in_one_thread(kernel: Any) -> Kernel:
    def run(keyset: Any, *args: Any, **settings: Any) -> Any:
        return _alone(kernel, keyset, args, settings)

    return run


def _elementwise(kernel: Any) -> Kernel:
    def run(keyset: Any, *args: Any, **settings: Any) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if max(t.numel() for t in tensors) <= GRAIN or _has_whole_shares(tensors):
            return kernel.call_boxed(keyset, *args, **settings)
        return _alone(kernel, keyset, args, settings)

    return run


def _mul(kernel: Any) -> Kernel:
    """Replace a product of elements; torch hands a tensor that stands for a Python number over as that number."""
    run = _elementwise(kernel)

    def multiply(keyset: Any, a: Any, b: Any) -> Any:
        return run(keyset, *(x if isinstance(x, Tensor) else _wrapped(x, y) for x, y in ((a, b), (b, a))))

    return multiply


def _wrapped(number: Any, tensor: Tensor) -> Tensor:
    """Return a number as a tensor that does not change the dtype of its product with ``tensor``, and is not rounded."""
    exact = isinstance(number, float) and tensor.is_floating_point()
    return torch.tensor(number, dtype=torch.float64 if exact else torch.result_type(tensor, number))


def _has_whole_shares(tensors: Sequence[Tensor]) -> bool:
    """Whether each thread's share of an elementwise operation is made of whole vectors."""
    threads, most = torch.get_num_threads(), max(t.numel() for t in tensors)
    share = -(-most // min(threads, -(-most // GRAIN)))
    rows = all(t.is_contiguous() and (t.dim() == 0 or t.shape[-1] % WHOLE == 0) for t in tensors)
    return rows and share % WHOLE == 0


def _attention(place: int) -> Callable[[Any], Kernel]:
    def replace(kernel: Any) -> Kernel:
        def run(keyset: Any, *args: Any, **settings: Any) -> Any:
            if args[place].shape[2] < ALIGNED_QUERIES:
                return _alone(kernel, keyset, args, settings)
            return kernel.call_boxed(keyset, *args, **settings)

        return run

    return replace


# ---- products -----------------------------------------------------------------------------------------------------------


def _mm(kernel: Any) -> Kernel:
    def run(keyset: Any, a: Tensor, b: Tensor, **settings: Any) -> Any:
        if a.numel() * b.shape[-1] <= SMALL:
            return _alone(kernel, keyset, (a, b), settings)
        made = ordered_product(a, b)
        return kernel.call_boxed(keyset, a, b, **settings) if made is None else _into(made, **settings)

    return run


def _addmm(kernel: Any, in_place: bool = False) -> Kernel:
    def run(keyset: Any, given: Tensor, a: Tensor, b: Tensor, beta: Any = 1, alpha: Any = 1, **settings: Any) -> Any:
        if a.numel() * b.shape[-1] <= SMALL:
            return _alone(kernel, keyset, (given, a, b), {"beta": beta, "alpha": alpha, **settings})
        bias = given if given.dim() == 1 and alpha == beta == 1 else None
        made = ordered_product(a, b, bias)
        if made is None:
            return kernel.call_boxed(keyset, given, a, b, beta=beta, alpha=alpha, **settings)
        if bias is None:
            made = made.mul_(alpha)
            made = made.add_(given, alpha=beta) if beta else made
        return given.copy_(made) if in_place else _into(made, **settings)

    return run


def _addmm_(kernel: Any) -> Kernel:
    return _addmm(kernel, in_place=True)


def _into(made: Tensor, out: Tensor | None = None) -> Tensor:
    return made if out is None else out.resize_(made.shape).copy_(made)


#: The function that replaces each operation, given torch's kernel.
_REPLACEMENTS: dict[str, Callable[[Any], Kernel]] = {
    **dict.fromkeys(SUMS, _in_one_thread),
    **dict.fromkeys(BATCHED, _in_one_thread),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("mm", "mm.out"), _mm),
    **dict.fromkeys(("addmm", "addmm.out"), _addmm),
    "addmm_": _addmm_,
    "mul.Tensor": _mul,
    **{name: _attention(place) for name, place in ATTENTION.items()},
}
