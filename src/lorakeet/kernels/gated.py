"""The gated activation of a feed-forward network, which keeps its two inputs alone (Shazeer 2020, arXiv:2002.05202).

    h = f(a)·b          ∂a = f'(a)·b·∂h,   ∂b = f(a)·∂h

f(a) = a·σ(a) for ``silu``, a·Φ(a) for ``gelu``, and its approximation by tanh for ``gelu_tanh`` (Hendrycks & Gimpel 2016,
arXiv:1606.08415). Autograd keeps f(a) too; here it is made again for the backward pass, in the memory of the gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]


def gated_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """The slow truth: the equation in plain torch, differentiated by autograd."""
    return _activate(gate, activation) * up


def _activate(gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="none" if activation == "gelu" else "tanh")


def _backward_(grad: Tensor, gate: Tensor, activation: Activation) -> Tensor:
    """f'(gate)·grad, in the place of ``grad``."""
    ops: Any = torch.ops.aten
    if activation == "silu":
        made: Tensor = ops.silu_backward.grad_input(grad, gate, grad_input=grad)
    else:
        kind = "none" if activation == "gelu" else "tanh"
        made = ops.gelu_backward.grad_input(grad, gate, approximate=kind, grad_input=grad)
    return made


class _Gated(torch.autograd.Function):
    """gate and up [...], one dtype -> [...]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activate(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dgate = _backward_(grad * up, gate, ctx.activation) if ctx.needs_input_grad[0] else None
        dup = _activate(gate, ctx.activation).mul_(grad) if ctx.needs_input_grad[1] else None
        return dgate, dup, None


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """f(gate)·up, element by element.

    Args:
        gate, up: [...] of one shape; of different dtypes, the reference is what runs.
        activation: f above.
    """
    if gate.dtype != up.dtype or gate.shape != up.shape:
        return gated_reference(gate, up, activation)
    product: Tensor = _Gated.apply(gate, up, activation)
    return product
