"""The registry of 8-bit products: each back end is one :class:`Implementation`, and :func:`best` chooses.

``LORAKEET_INT8`` names the back end to use where it can multiply; elsewhere the order of the registry decides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.errors import ConfigError
from lorakeet.kernels.cpu import features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.gemm import GEMV_TOKENS, LowRank
from lorakeet.kernels.int8 import blocked, gpu, tiled


def _everywhere() -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """A back end of the 8-bit products, for a weight W₈ int8 [out, in] with its ``scale``.

    Attributes:
        name: Value of ``LORAKEET_INT8``.
        requires: Features of the processor without which it does not run, or is too slow to be chosen.
        supports: Whether it multiplies x [n, in], or g [n, out], by the weight. The answer is kept for each shape class, so
            it depends on nothing else: the device, the weight's shape, and whether n is at most
            :data:`~lorakeet.kernels.cpu.gemm.GEMV_TOKENS`.
        product: (x [n, in], weight, scale, bias [out] or None, low_rank (u [n, r], v [out, r]) or None) -> h [n, out] in x's
            dtype. h = (x·diag(c))·W₈ᵀ·diag(s) + b + u·vᵀ, the outlier columns included.
        input_gradient: (g [n, out], weight, scale) -> ∂x [n, in] in g's dtype. ∂x = (g·diag(s))·W₈·diag(c), the outlier
            columns included.
        unavailable: The reason why this machine cannot run it, beyond missing features, or None.
    """

    name: str
    requires: frozenset[Feature]
    supports: Callable[[Tensor, Tensor], bool]
    product: Callable[[Tensor, Tensor, Tensor, Tensor | None, LowRank | None], Tensor]
    input_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    unavailable: Callable[[], str | None] = _everywhere


def _many_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether x has enough CPU tokens to gain from rounding; few tokens read the weight once and gain nothing."""
    return x.is_cpu and x.shape[0] > GEMV_TOKENS


#: The back ends, best first.
_implementations = [
    Implementation("triton", frozenset(), gpu.supports, gpu.product, gpu.input_gradient, gpu.unavailable),
    Implementation(
        "amx",
        frozenset({Feature.AVX2, Feature.AMX}),
        _many_on_cpu,
        tiled.amx_product,
        tiled.amx_input_gradient,
    ),
    Implementation("vnni", frozenset({Feature.VNNI}), _many_on_cpu, tiled.product, tiled.vnni_input_gradient),
    Implementation("pairs", frozenset({Feature.AVX2}), _many_on_cpu, tiled.product, tiled.pairs_input_gradient),
    Implementation("blocked", frozenset(), lambda x, weight: True, blocked.product, blocked.input_gradient),
]
#: Back ends chosen so far, by shape class: the device, the weight's shape, and whether there are many tokens.
_chosen: dict[tuple[torch.device, torch.Size, bool], Implementation] = {}


def implementations() -> tuple[Implementation, ...]:
    """Return the registered back ends, best first."""
    return tuple(_implementations)


def register(implementation: Implementation) -> Implementation:
    """Add a back end, preferred to those registered before it.

    Raises:
        ValueError: Another one has its name.
    """
    if any(other.name == implementation.name for other in _implementations):
        raise ValueError(f"an 8-bit back end named {implementation.name!r} is registered already")
    _implementations.insert(0, implementation)
    _chosen.clear()
    return implementation


def unregister(name: str) -> None:
    """Remove a back end."""
    _implementations[:] = [other for other in _implementations if other.name != name]
    _chosen.clear()


def missing(implementation: Implementation) -> str | None:
    """Return the reason why this machine cannot run a back end, not even slowly; None if it can."""
    if lacking := implementation.requires - features.runnable():
        return f"this processor, or the compiled library, has no {', '.join(sorted(lacking))}"
    return implementation.unavailable()


def named(name: str) -> Implementation:
    """Find a back end by its name.

    Raises:
        ConfigError: No back end has the name, or this machine cannot run it.
    """
    found = next((other for other in _implementations if other.name == name), None)
    runnable = [other.name for other in _implementations if missing(other) is None]
    if found is None:
        raise ConfigError(f"LORAKEET_INT8: unknown back end {name!r}", hint=f"name one of: {', '.join(runnable)}")
    if (reason := missing(found)) is not None:
        raise ConfigError(
            f"LORAKEET_INT8: {name!r} cannot run here: {reason}", hint=f"name one of: {', '.join(runnable)}"
        )
    return found


def best(x: Tensor, weight: Tensor) -> Implementation:
    """Return the back end that multiplies x [n, in] (backward: g [n, out]) by an int8 weight [out, in].

    The choice is made once for each shape class: device, shape of the weight, few or many tokens.

    Raises:
        ConfigError: ``LORAKEET_INT8`` names no back end of this machine.
    """
    shape_class = x.device, weight.shape, x.shape[0] > GEMV_TOKENS
    found = _chosen.get(shape_class)
    if found is None:
        found = _chosen[shape_class] = _choose(x, weight)
    return found


def _choose(x: Tensor, weight: Tensor) -> Implementation:
    asked = os.environ.get("LORAKEET_INT8")
    if asked and (wanted := named(asked)).supports(x, weight):
        return wanted
    available = features.available()
    return next(one for one in _implementations if one.requires <= available and one.supports(x, weight))


def best_on(device: torch.device | str) -> Implementation:
    """Return the back end for many tokens on a device."""
    x = torch.empty(GEMV_TOKENS + 1, 1, device=device)
    return best(x, torch.empty(1, 1, dtype=torch.int8, device=device))


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use a named back end wherever it supports the tensors, as ``LORAKEET_INT8`` does; for tests and comparisons."""
    before = os.environ.get("LORAKEET_INT8")
    os.environ["LORAKEET_INT8"] = name
    _chosen.clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["LORAKEET_INT8"]
        else:
            os.environ["LORAKEET_INT8"] = before
        _chosen.clear()
