"""Layers that are run again in the backward pass instead of being remembered: gradient checkpointing (Chen et al. 2016,
arXiv:1604.06174), of every layer or of every n-th, and only where a pass would not fit into memory otherwise.

A layer that is run again keeps nothing but its input, draws the same random numbers, and computes the same bits, so loss and
gradients are those of a run without. It costs one more forward pass of these layers.

How much a pass keeps is measured: one forward pass of real samples, in which each tensor that autograd would keep is
counted and, within layers, let go.
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


def repeatable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that transformers can run again, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def can_recompute(model: nn.Module) -> bool:
    """Whether :func:`recomputed` can run any layer of a model again."""
    return (
        isinstance(model, PreTrainedModel) and model.supports_gradient_checkpointing and bool(repeatable_layers(model))
    )


@contextmanager
def recomputed(model: nn.Module, every: int = 1) -> Iterator[None]:
    """While this holds, layers 0, n, 2n, … of ``model`` are run again in the backward pass, when it is in training mode.

    Args:
        model: of transformers, or with an adapter.
        every: n above; 1: all layers.

    Raises:
        TrainingError: the model has no layers that can be run again.
    """
    if not (isinstance(model, PreTrainedModel) and can_recompute(model)):
        raise TrainingError(
            f"{type(model).__name__} has no layers that can be run again", "train.gradient_checkpointing=false"
        )
    switches = {m: m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")}
    inputs_learned = bool(getattr(model, "_require_grads_hooks", None))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = [layer for index, layer in enumerate(repeatable_layers(model)) if index % every == 0]
    aside = _Inputs(len(again))
    if not inputs_learned:  # so embeddings need no gradient, nor does any layer below the lowest that learns
        model.disable_input_require_grads()
    try:
        for layer in repeatable_layers(model):
            layer.gradient_checkpointing = layer in again
        for layer in again:
            layer._gradient_checkpointing_func = functools.partial(aside.run, layer._gradient_checkpointing_func)
        yield
    finally:
        for layer in again:
            if isinstance(run := layer._gradient_checkpointing_func, functools.partial) and run.func == aside.run:
                layer._gradient_checkpointing_func = run.args[0]
        for module, before in switches.items():
            module.gradient_checkpointing = before


class _Inputs:
    """The inputs of layers that are run again, side by side in memory of their own.

    On a CPU they would otherwise lie in the heap among all that the layers soon give back, and leave holes between them that
    nothing fits into: two or three times as much as they are themselves.
    """

    def __init__(self, layers: int) -> None:
        self.layers, self.free = layers, torch.empty(0, dtype=torch.uint8)

    def run(self, checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """``checkpoint(layer, *args)``, the first of which is set aside."""
        if args and torch.is_tensor(args[0]) and args[0].is_cpu and args[0].is_contiguous():
            args = (_Aside.apply(args[0], self), *args[1:])
        return checkpoint(layer, *args, **settings)

    def room(self, x: Tensor) -> Tensor:
        """An empty tensor like x; the memory of a pass goes when all that lie in it have gone."""
        size = -(-x.nbytes // 64) * 64
        if self.free.numel() < size:
            self.free = torch.empty(size * self.layers, dtype=torch.uint8)
        at = self.free.storage_offset() // x.element_size()
        made = x.new_empty(0).set_(self.free.untyped_storage(), at, x.shape, x.stride())  # type: ignore[call-overload]
        left = self.free[size:]
        # an empty slice would hold on to the memory
        self.free = left if len(left) else torch.empty(0, dtype=torch.uint8)
        return made


class _Aside(torch.autograd.Function):
    """x, in memory where it is set aside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: _Inputs) -> Tensor:  # type: ignore[override]
        return inputs.room(x).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


@dataclass(frozen=True)
class Kept:
    """Bytes that a pass keeps for its backward pass.

    Attributes:
        layers: By each of :func:`repeatable_layers`.
        inputs: Hidden states that each of them is given: all that is kept of one that is run again.
        rest: Outside of the layers.
    """

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    rest: int

    def peak(self, every: int | None) -> int:
        """The most that is held at once if layers 0, n, 2n, … are run again; None: no layer is.

        The backward pass goes from the last layer to the first and lets go of each. It needs all that is left below, what
        the layer itself has kept or makes again, and about as much once more to work with.
        """
        most = below = 0
        for index, (kept, given) in enumerate(zip(self.layers, self.inputs, strict=True)):
            again = every is not None and index % every == 0
            most = max(most, below + (given if again else 0) + 2 * kept)
            below += given if again else kept
        return self.rest + most


def kept_by(model: nn.Module, forward: Callable[[], Any]) -> Kept:
    """What ``forward()``, a pass of ``model``, keeps for its backward pass; it returns what holds the graph.

    Weights count nothing: they are there anyway. A storage that several layers keep counts once. What layers keep is let go
    at once, so the pass itself takes little and can have no backward pass. Outside of them it stays, since a loss may make
    its gradient right away; what is gone at the end of the pass counts nothing.
    """
    layers = repeatable_layers(model)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, StorageWeakRef] = {}  # a weak reference keeps the number from being given to another storage
    counts, inputs = [0] * len(layers), [0] * len(layers)
    outside: dict[int, int] = {}
    place: int | None = None  # the layer that runs

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number not in own and number not in seen:
            seen[number] = StorageWeakRef(storage)
            if place is None:
                outside[number] = size
            else:
                counts[place] += size
        return tensor.detach() if place is None else tensor.new_empty(0)  # itself: a graph that holds on to itself

    def enter(index: int, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        nonlocal place
        place = index
        hidden = args[0] if args else kwargs.get("hidden_states")
        inputs[index] = hidden.nbytes if torch.is_tensor(hidden) else 0

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal place
        place = None

    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            before = functools.partial(enter, index)
            undo.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(layer.register_forward_hook(leave, always_call=True).remove)
        undo.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept))
        graph = forward()
    rest = sum(size for number, size in outside.items() if not seen[number].expired())
    del graph
    return Kept(tuple(counts), tuple(inputs), rest)


def choose_every(kept: Kept, passes: float, room: float) -> int | None:
    """Which layers have to be run again for a pass to fit: every n-th, as few as possible; None: none has to.

    Args:
        kept: by the pass that was measured.
        passes: how many times as large the largest pass is.
        room: bytes that it may take.

    Returns:
        n; 1 also where not even that fits.
    """
    if kept.peak(None) * passes <= room or not kept.layers:
        return None
    fitting = (n for n in range(len(kept.layers), 1, -1) if kept.peak(n) * passes <= room)
    return next(fitting, 1)
