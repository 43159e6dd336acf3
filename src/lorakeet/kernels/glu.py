"""Gated activation of a feed-forward network that saves only its two inputs (Shazeer 2020, arXiv:2002.05202).

    h = f(a)·b          ∂a = f'(a)·b·∂h,   ∂b = f(a)·∂h

f(a) = a·σ(a) for ``silu``, a·Φ(a) for ``gelu``, and its approximation by tanh for ``gelu_tanh`` (Hendrycks & Gimpel 2016,
arXiv:1606.08415). Autograd saves f(a) too; here it is recomputed for the backward pass. On a CPU in fp32 each direction is
one pass over memory (``elementwise.c``), elsewhere a few of torch's. The two inputs are the largest activations that a layer
saves. They may be saved in a narrower dtype: the output is the same, and the gradient differs by their rounding error.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.cpu import bindings

Activation = Literal["silu", "gelu", "gelu_tanh"]

#: Number of each activation in ``elementwise.c``; the others have no compiled kernel.
LOOPS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}


def gated_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Compute the reference: the equation in plain torch, differentiated by autograd."""
    return _activate(gate, activation) * up


def _activate(gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="none" if activation == "gelu" else "tanh")


def _backward_(grad: Tensor, gate: Tensor, activation: Activation) -> Tensor:
    """Compute f'(gate)·grad in the memory of ``grad``."""
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
    def forward(  # type: ignore[override]
        ctx: Any, gate: Tensor, up: Tensor, activation: Activation, keep: torch.dtype
    ) -> Tensor:
        ctx.activation = activation
        if activation in LOOPS and bindings.supports(gate, up):
            h, gate, up = bindings.gated(gate, up, LOOPS[activation], keep == torch.bfloat16)
        else:
            h = _activate(gate, activation).mul_(up)
        ctx.save_for_backward(*(t if t.dtype == keep else t.to(keep) for t in (gate, up)))
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        known = ctx.activation in LOOPS and gate.dtype in (torch.float32, torch.bfloat16)
        if known and bindings.supports(grad) and bindings.is_cpu_contiguous(gate, up):
            return *bindings.gated_backward(grad, gate, up, LOOPS[ctx.activation]), None, None
        gate, up = gate.to(grad.dtype), up.to(grad.dtype)
        dgate = _backward_(grad * up, gate, ctx.activation) if ctx.needs_input_grad[0] else None
        dup = _activate(gate, ctx.activation).mul_(grad) if ctx.needs_input_grad[1] else None
        return dgate, dup, None, None


def gated(gate: Tensor, up: Tensor, activation: Activation, keep: torch.dtype | None = None) -> Tensor:
    """Compute f(gate)·up, element by element.

    Args:
        gate: [...], any floating dtype.
        up: [...], the shape of ``gate``; if dtype or shape differ, the reference runs.
        activation: f above.
        keep: dtype in which gate and up are saved for the backward pass; their own if None.

    Returns:
        [...] in the dtype of ``gate``.
    """
    if gate.dtype != up.dtype or gate.shape != up.shape:
        return gated_reference(gate, up, activation)
    product: Tensor = _Gated.apply(gate, up, activation, keep or gate.dtype)
    return product
