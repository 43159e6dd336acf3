"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) of every layer or of every n-th.

A checkpointed layer keeps only its input and runs again in the backward pass. It draws the same random numbers and
computes the same bits, so loss and gradients do not change. The cost is one more forward pass of these layers.

The bytes that a pass keeps are measured by one forward pass of real samples. Each tensor that autograd would keep is
counted and, within layers, freed at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
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
        return checkpoint(layer, *args, **settings)

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


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that a pass keeps for its backward pass.

    Attributes:
        layers: Bytes of each of :func:`checkpointable_layers`.
        inputs: Bytes of each layer's input, which is all that a checkpointed layer keeps.
        rest: Bytes outside of the layers.
    """

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    rest: int

    def peak(self, every: int | None) -> int:
        """Return the peak if layers 0, n, 2n, … are checkpointed; None: no layer is.

        The backward pass frees layers from the last to the first. It needs all bytes of the layers below, those that
        the layer itself has kept or computes again, and about as many for its gradients.
        """
        peak = below = 0
        for index, (kept, layer_input) in enumerate(zip(self.layers, self.inputs, strict=True)):
            checkpointed = every is not None and index % every == 0
            peak = max(peak, below + (layer_input if checkpointed else 0) + 2 * kept)
            below += layer_input if checkpointed else kept
        return self.rest + peak


def kept_by(model: nn.Module, forward: Callable[[], Any]) -> KeptBytes:
    """Measure the bytes that ``forward()``, a pass of ``model``, keeps for its backward pass.

    Weights do not count. A storage that several layers keep counts once. Tensors that layers keep are freed at once, so
    the pass itself takes little memory and can have no backward pass. Tensors outside of layers stay, since a loss may
    compute its gradient right away. Tensors that are freed before the end of the pass do not count.

    Args:
        model: The model that ``forward`` calls.
        forward: Runs the pass and returns an object that holds its graph.
    """
    layers = checkpointable_layers(model)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, StorageWeakRef] = {}  # a weak reference keeps the number from being reused
    counts, inputs = [0] * len(layers), [0] * len(layers)
    outside: dict[int, int] = {}
    running: int | None = None  # index of the layer that runs

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number not in own and number not in seen:
            seen[number] = StorageWeakRef(storage)
            if running is None:
                outside[number] = size
            else:
                counts[running] += size
        return (
            tensor.detach() if running is None else tensor.new_empty(0)
        )  # the tensor itself would be a reference cycle

    def enter(index: int, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        nonlocal running
        running = index
        hidden = args[0] if args else kwargs.get("hidden_states")
        inputs[index] = hidden.nbytes if torch.is_tensor(hidden) else 0

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal running
        running = None

    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            undo.callback(layer.register_forward_pre_hook(functools.partial(enter, index), with_kwargs=True).remove)
            undo.callback(layer.register_forward_hook(leave, always_call=True).remove)
        undo.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept))
        graph = forward()
    alive = [size for number, size in outside.items() if not seen[number].expired()]
    del graph
    return KeptBytes(tuple(counts), tuple(inputs), sum(alive))


def choose_every(kept: KeptBytes, passes: float, available: float) -> int | None:
    """Choose n so that a pass fits with every n-th layer checkpointed, as few as possible; None: no layer has to be.

    Args:
        kept: Bytes of the pass that was measured.
        passes: Size of the largest pass, relative to the measured one.
        available: Bytes that the largest pass may take.

    Returns:
        n; 1 also where not even that fits.
    """
    if kept.peak(None) * passes <= available or not kept.layers:
        return None
    fitting = (n for n in range(len(kept.layers), 1, -1) if kept.peak(n) * passes <= available)
    return next(fitting, 1)
