"""Which kernel computes the attention of a row of samples, and the two on GPUs that take the whole row at once.

torch's ``varlen_attn`` (2.10: plain; 2.11: scale and window; 2.12: grouped queries) and flash-attn's
``flash_attn_varlen_func`` (soft-capping and dropout too) are both FlashAttention (Dao 2023, arXiv:2307.08691): they read
where each sample begins, so a row of any lengths is one call, and nothing is quadratic in memory.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorakeet.kernels.attention.segment import Pattern

#: cpu: torch's CPU kernel, batch by batch in one node of autograd; varlen, flash_attn: the whole row at once on a GPU;
#: batches: torch's scaled_dot_product_attention for each run of equal lengths; capped: so in plain torch, scores capped.
Path = Literal["cpu", "varlen", "flash_attn", "batches", "capped"]

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.bfloat16, torch.float16)
#: GPUs whose backward kernels hold heads wider than 192: A100 and H100, H200.
_LARGE = ((8, 0), (9, 0))


@dataclass(frozen=True)
class Kernels:
    """What there is on a device.

    Attributes:
        cpu: torch has its flash kernel for CPUs.
        capability: Compute capability of an NVIDIA GPU, (9, 0) for an H100; None for any other device.
        varlen: Names of what torch's varlen_attn takes; empty where there is none.
        flash_attn: The same of flash-attn's function.
    """

    cpu: bool = False
    capability: tuple[int, int] | None = None
    varlen: frozenset[str] = frozenset()
    flash_attn: frozenset[str] = frozenset()


def choose_path(
    kernels: Kernels, device: str, dtype: torch.dtype, heads: tuple[int, int], widths: tuple[int, int], pattern: Pattern
) -> Path:
    """The kernel for a row.

    Args:
        kernels: What there is on the device.
        device: Its type: cpu, cuda, mps, …
        dtype: Of q, k and v.
        heads: Of q; of k and v.
        widths: Of a head of q and k; of v.
        pattern: Who sees whom.
    """
    one_width, plain = widths[0] == widths[1], not (pattern.dropout or pattern.softcap)
    if device == "cpu" and kernels.cpu and one_width and plain and dtype in _CPU_DTYPES:
        return "cpu"
    fits = device == "cuda" and one_width and widths[0] % 8 == 0 and dtype in _GPU_DTYPES
    most = 256 if kernels.capability in _LARGE else 192
    if fits and kernels.capability is not None and kernels.capability >= (8, 0) and widths[0] <= most:
        needed = {"scale", "window_size"} | ({"enable_gqa"} if heads[0] != heads[1] else set())
        if plain and needed <= kernels.varlen:
            return "varlen"
        needed = {"softmax_scale", "window_size"} | ({"softcap"} if pattern.softcap else set())
        if needed <= kernels.flash_attn:
            return "flash_attn"
    return "batches" if pattern.softcap is None else "capped"


@functools.cache
def kernels_on(device: torch.device) -> Kernels:
    """What there is on a device; asked once."""
    cpu = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    if device.type != "cuda" or torch.version.cuda is None:
        return Kernels(cpu=cpu)
    named = [_arguments(_function(*place)) for place in (_VARLEN, _FLASH_ATTN)]
    return Kernels(cpu, torch.cuda.get_device_capability(device), *named)


_VARLEN = ("torch.nn.attention.varlen", "varlen_attn")
_FLASH_ATTN = ("flash_attn", "flash_attn_varlen_func")


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError, RuntimeError):  # not there, or built for another torch
        return None


def _arguments(function: Callable[..., Any] | None) -> frozenset[str]:
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


def window(pattern: Pattern) -> tuple[int, int]:
    """How many positions before and after its own a position sees; -1: all."""
    if pattern.causal:
        return (-1 if pattern.window is None else pattern.window - 1), 0
    return (-1, -1) if pattern.window is None else (pattern.window, pattern.window)


@functools.lru_cache(maxsize=8)  # every layer asks for the same
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sample begins, and the end: [samples + 1] int32."""
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def varlen_attention(
    path: Path, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], pattern: Pattern, scale: float | None
) -> Tensor:
    """q [total, h, d], k and v [total, h_kv, d] -> [total, h, d], by ``varlen`` or ``flash_attn``.

    Args:
        lengths: Positions of each sample, none of them 0.
        scale: 1/√d if None.
    """
    offsets, most = _offsets(lengths, q.device), max(lengths, default=0)
    place: dict[str, Any] = {"window_size": window(pattern)}
    if path == "varlen":
        place |= {"scale": scale} | ({"enable_gqa": True} if q.shape[1] != k.shape[1] else {})
        function = _function(*_VARLEN)
    else:
        place |= {"softmax_scale": scale, "dropout_p": pattern.dropout, "causal": pattern.causal}
        place |= {} if pattern.softcap is None else {"softcap": pattern.softcap}
        function = _function(*_FLASH_ATTN)
    assert function is not None
    output: Tensor = function(q, k, v, offsets, offsets, most, most, **place)
    return output
