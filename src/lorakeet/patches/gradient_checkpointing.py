"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) of every layer or of every n-th.

A checkpointed layer keeps only its input and runs again in the backward pass. It draws the same random numbers and
computes the same bits, so loss and gradients do not change. The cost is one more forward pass of these layers.

What a pass keeps, and which layers have to be checkpointed so that it fits, is predicted by :mod:`lorakeet.plan`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorakeet.errors import TrainingError


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers that transformers can checkpoint, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def can_checkpoint(model: nn.Module) -> bool:
    """Whether :func:`gradient_checkpointing` can checkpoint any layer of a model."""
    return (
        isinstance(model, PreTrainedModel)
        and model.supports_gradient_checkpointing
        and bool(checkpointable_layers(model))
    )


@contextmanager
def gradient_checkpointing(model: nn.Module, every: int = 1) -> Iterator[None]:
    """Checkpoint layers 0, n, 2n, … of ``model`` while it is in training mode.

    Args:
        model: A model of transformers, or one with an adapter.
        every: n above; 1: all layers.

    Raises:
        TrainingError: The model has no layers that can be checkpointed.
    """
    if not (isinstance(model, PreTrainedModel) and can_checkpoint(model)):
        raise TrainingError(
            f"{type(model).__name__} has no layers that can be checkpointed", "train.gradient_checkpointing=false"
        )
    switches = {m: m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")}
    inputs_require_grad = bool(getattr(model, "_require_grads_hooks", None))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = [layer for index, layer in enumerate(checkpointable_layers(model)) if index % every == 0]
    buffer = _InputBuffer(len(checkpointed))
    if not inputs_require_grad:  # so no layer below the lowest trainable one computes a gradient
        model.disable_input_require_grads()
    try:
        for layer in checkpointable_layers(model):
            layer.gradient_checkpointing = layer in checkpointed
        for layer in checkpointed:
            layer._gradient_checkpointing_func = functools.partial(buffer.run, layer._gradient_checkpointing_func)
        yield
    finally:
        for layer in checkpointed:
            if isinstance(run := layer._gradient_checkpointing_func, functools.partial) and run.func == buffer.run:
                layer._gradient_checkpointing_func = run.args[0]
        for module, before in switches.items():
            module.gradient_checkpointing = before


class _Recomputation(threading.local):
    """Whether this thread runs a checkpointed layer again, so that the backward pass has what the first run did not keep."""

    active = False


_recomputation = _Recomputation()


def is_recomputing() -> bool:
    """Whether the layer that runs is run again for the backward pass, which does not read its output."""
    return _recomputation.active


def _marked(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer whose second and later runs are recomputations."""
    runs = 0

    def run(*args: Any, **settings: Any) -> Any:
        nonlocal runs
        runs += 1
        before, _recomputation.active = _recomputation.active, runs > 1
        try:
            return layer(*args, **settings)
        finally:
            _recomputation.active = before

    return run


class _InputBuffer:
    """The inputs of checkpointed layers on a CPU, in one buffer.

    Allocated one by one among short-lived activations they would fragment the heap, by two to three times their size.
    """

    def __init__(self, layers: int) -> None:
        self.layers, self.free = layers, torch.empty(0, dtype=torch.uint8)

    def run(self, checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """Call ``checkpoint(layer, *args)`` with the first argument copied into the buffer."""
        if args and torch.is_tensor(args[0]) and args[0].is_cpu and args[0].is_contiguous():
            args = (_CopyToBuffer.apply(args[0], self), *args[1:])
        return checkpoint(_marked(layer), *args, **settings)

    def allocate(self, x: Tensor) -> Tensor:
        """Return an empty tensor like x; the buffer of a pass is freed with the last tensor in it."""
        size = -(-x.nbytes // 64) * 64
        if self.free.numel() < size:
            self.free = torch.empty(size * self.layers, dtype=torch.uint8)
        offset = self.free.storage_offset() // x.element_size()
        storage: Any = self.free.untyped_storage()
        allocated = x.new_empty(0).set_(storage, offset, x.shape, x.stride())
        left = self.free[size:]
        # an empty slice would keep the buffer alive
        self.free = left if len(left) else torch.empty(0, dtype=torch.uint8)
        return allocated


class _CopyToBuffer(torch.autograd.Function):
    """Identity whose output lies in the buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: _InputBuffer) -> Tensor:  # type: ignore[override]
        return buffer.allocate(x).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
