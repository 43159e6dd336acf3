"""Verification of patched forwards: a patch is applied only where it agrees with the module's own forward.

The comparison runs once per layer type, on random numbers. A module that differs keeps its own forward, with a
warning: a new version of a library may have changed what the module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from lorakeet.log import warn
from lorakeet.rng import same_random_state


class Verifier:
    """Results of the comparisons, one per layer type."""

    def __init__(self) -> None:
        self._agrees: dict[Hashable, bool] = {}

    def agrees(self, layer_type: Hashable, module: nn.Module, compare: Callable[[], bool]) -> bool:
        """Whether the patch of a layer type agrees with the module's own forward.

        Args:
            layer_type: Modules of one layer type are compared once.
            module: A module of that type, named in the warning.
            compare: Runs both forwards; random numbers that it draws do not count.
        """
        if layer_type not in self._agrees:
            with same_random_state():
                self._agrees[layer_type] = compare()
            if not self._agrees[layer_type]:
                warn(f"{type(module).__name__} does not match its patch and stays unpatched")
        return self._agrees[layer_type]


def is_close(own: Tensor, patched: Tensor, tolerance: float, relative: float = 0.0) -> bool:
    """Whether two tensors have one dtype and differ by rounding alone.

    Args:
        own: Result of the module's own forward.
        patched: Result of the patch.
        tolerance: Largest difference, as a share of the largest absolute value of ``own``.
        relative: Further difference, as a share of each value.
    """
    if own.dtype != patched.dtype:
        return False
    return torch.allclose(patched, own, rtol=relative, atol=tolerance * float(own.abs().max()))


def same_output_and_gradient(
    own: Callable[[Tensor], Tensor], patched: Callable[[Tensor], Tensor], x: Tensor, roundings: int
) -> bool:
    """Whether two forwards have equal outputs and input gradients, up to rounding.

    Args:
        own: The module's own forward.
        patched: The patch.
        x: Input of both.
        roundings: Largest difference in units of rounding of the dtype (its ``eps``).
    """
    expected, found = output_and_gradient(own, x), output_and_gradient(patched, x)
    near = [roundings * torch.finfo(tensor.dtype).eps for tensor in expected]
    return all(is_close(a, b, eps, eps) for a, b, eps in zip(expected, found, near, strict=True))


@torch.enable_grad()
def output_and_gradient(forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and input gradient of a forward; dropout inside draws the same numbers in each call."""
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype))
    return y.detach(), gradient
