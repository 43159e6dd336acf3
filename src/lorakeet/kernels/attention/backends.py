"""The choice of an attention back end, and the two on GPUs that take a whole row of samples at once.

torch's ``varlen_attn`` (2.10: plain; 2.11: scale and window; 2.12: grouped queries) and flash-attn's
``flash_attn_varlen_func`` (soft-capping and dropout too) are both FlashAttention (Dao 2023, arXiv:2307.08691): they read
the offset of each sample, so a row of any lengths is one call, and memory is linear in it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorakeet.kernels.attention.pattern import Pattern

#: Names. cpu: the compiled kernel, or torch's CPU flash kernel batch by batch, as one autograd node. torch_varlen,
#: flash_attn:
#: the whole row at once on a GPU. sdpa: torch's scaled_dot_product_attention for each run of equal lengths. softcap: plain
#: torch with capped scores, for each run of equal lengths.
Backend = Literal["cpu", "torch_varlen", "flash_attn", "sdpa", "softcap"]

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.bfloat16, torch.float16)
#: Compute capabilities whose backward kernels hold heads wider than 192: A100; H100 and H200.
_LARGE = ((8, 0), (9, 0))


@dataclass(frozen=True)
class AvailableKernels:
    """The attention kernels that a device and the installed packages offer.

    Attributes:
        cpu: torch has its flash kernel for CPUs.
        capability: Compute capability of an NVIDIA GPU, (9, 0) for an H100; None for any other device.
        varlen: Parameter names of torch's ``varlen_attn``; empty without it.
        flash_attn: Parameter names of flash-attn's function; empty without it.
    """

    cpu: bool = False
    capability: tuple[int, int] | None = None
    varlen: frozenset[str] = frozenset()
    flash_attn: frozenset[str] = frozenset()


def choose_backend(
    kernels: AvailableKernels,
    device: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    widths: tuple[int, int],
    pattern: Pattern,
) -> Backend:
    """Choose the back end for a row.

    Args:
        kernels: The kernels of the device.
        device: Type of the device: cpu, cuda, mps, …
        dtype: dtype of q, k and v.
        heads: Number of heads of q, and of k and v.
        widths: Width of a head of q and k, and of v.
        pattern: Which positions see which.
    """
    one_width, plain = widths[0] == widths[1], not (pattern.dropout or pattern.softcap)
    if device == "cpu" and kernels.cpu and one_width and plain and dtype in _CPU_DTYPES:
        return "cpu"
    fits = device == "cuda" and one_width and widths[0] % 8 == 0 and dtype in _GPU_DTYPES
    most = 256 if kernels.capability in _LARGE else 192
    if fits and kernels.capability is not None and kernels.capability >= (8, 0) and widths[0] <= most:
        needed = {"scale", "window_size"} | ({"enable_gqa"} if heads[0] != heads[1] else set())
        if plain and needed <= kernels.varlen:
            return "torch_varlen"
        needed = {"softmax_scale", "window_size"} | ({"softcap"} if pattern.softcap else set())
        if needed <= kernels.flash_attn:
            return "flash_attn"
    return "sdpa" if pattern.softcap is None else "softcap"


@functools.cache
def available_kernels(device: torch.device) -> AvailableKernels:
    """List the attention kernels of ``device`` (cached)."""
    cpu = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    if device.type != "cuda" or torch.version.cuda is None:
        return AvailableKernels(cpu=cpu)
    named = [_arguments(_function(*name)) for name in (_VARLEN, _FLASH_ATTN)]
    return AvailableKernels(cpu, torch.cuda.get_device_capability(device), *named)


_VARLEN = ("torch.nn.attention.varlen", "varlen_attn")
_FLASH_ATTN = ("flash_attn", "flash_attn_varlen_func")


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError, RuntimeError):  # not installed, or built for another torch
        return None


def _arguments(function: Callable[..., Any] | None) -> frozenset[str]:
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


@functools.lru_cache(maxsize=8)  # all layers of a step ask for the same offsets
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the offset of each sample, and the end: int32 [samples + 1]."""
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def packed_attention(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], pattern: Pattern, scale: float | None
) -> Tensor:
    """Compute the attention of a whole row on a GPU.

    Args:
        backend: ``torch_varlen`` or ``flash_attn``.
        q: [total, h, d].
        k: [total, h_kv, d].
        v: [total, h_kv, d].
        lengths: Positions of each sample, none of them 0.
        pattern: Which positions see which.
        scale: 1/√d if None.

    Returns:
        [total, h, d].
    """
    offsets, most = _offsets(lengths, q.device), max(lengths, default=0)
    options: dict[str, Any] = {"window_size": pattern.window_size()}
    if backend == "torch_varlen":
        options |= {"scale": scale} | ({"enable_gqa": True} if q.shape[1] != k.shape[1] else {})
        function = _function(*_VARLEN)
    else:
        options |= {"softmax_scale": scale, "dropout_p": pattern.dropout, "causal": pattern.causal}
        options |= {} if pattern.softcap is None else {"softcap": pattern.softcap}
        function = _function(*_FLASH_ATTN)
    assert function is not None
    output: Tensor = function(q, k, v, offsets, offsets, most, most, **options)
    return output
