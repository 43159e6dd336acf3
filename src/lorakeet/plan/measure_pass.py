"""Measurement of one pass of a model, part by part: bytes that are kept, peaks and seconds.

Marks between the parts are hooks: before and after each layer in the forward pass, and where the gradients of a layer's
output and input arrive in the backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.plan.live_bytes import LiveBytes
from lorakeet.plan.pass_cost import Part
from lorakeet.rng import same_random_state

#: Passes that are timed at most, and the seconds after which no further one is.
TIMED, LONG_ENOUGH = 4, 0.5
#: Bytes that are read before each timed part on a CPU, twice the last-level cache of common processors: in a whole model, the
#: other layers have left nothing of this one in the cache.
SWEPT = 1 << 26


class _Marks:
    """Parts of the pass that runs, closed one after the other."""

    def __init__(self, counter: LiveBytes | None, device: torch.device) -> None:
        self.counter, self.device = counter, device
        self.parts: list[Part] = []
        self.layer: int | None = None
        self.backward = False
        self.layer_input = 0
        self.swept = torch.ones(SWEPT // 4) if counter is None and device.type == "cpu" else None
        self._begin()

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.swept is not None:
            self.swept.sum()
        self.start = 0 if self.counter is None else self.counter.now
        if self.counter is not None:
            self.counter.restart()
        self.began = time.perf_counter()

    def close(self, layer: int | None = None, backward: bool | None = None, layer_input: int = 0) -> None:
        """End a part, and begin the next one, which belongs to ``layer``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.began
        now, most = (0, 0) if self.counter is None else (self.counter.now, self.counter.most)
        self.parts.append(
            Part(now - self.start, most - self.start, seconds, self.layer, self.backward, self.layer_input)
        )
        self.layer, self.layer_input = layer, layer_input
        self.backward = self.backward if backward is None else backward
        self._begin()


def measure_pass(
    model: nn.Module, layers: Sequence[nn.Module], run: Callable[[], Tensor | None], known: Any = ()
) -> list[Part]:
    """Measure the parts of a pass; draws no random number from the caller.

    Args:
        model: The model that runs.
        layers: Its layers, in the order in which they run; their parts have their numbers.
        run: Runs the forward pass and returns the loss; None for a pass without a backward one.
        known: Tensors from before the pass: its batch.

    Returns:
        The parts in order.
    """
    device = next(model.parameters()).device
    with same_random_state():
        for parameter in model.parameters():  # gradients count on their own
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        began = time.perf_counter()
        with LiveBytes(model, known) as counter:  # also makes what is made only once, before the passes that are timed
            counted = _run(layers, run, counter, device)
        _run(layers, run, None, device)  # makes the buffers that stay from pass to pass; the counted ones are gone
        timed = [[part.seconds for part in _run(layers, run, None, device)]]
        while len(timed) < TIMED and time.perf_counter() - began < LONG_ENOUGH:
            timed.append([part.seconds for part in _run(layers, run, None, device)])
    usual = sorted(timed, key=sum)[len(timed) // 2]  # a step takes the usual time, not the least
    return [replace(part, seconds=seconds) for part, seconds in zip(counted, usual, strict=True)]


def _run(
    layers: Sequence[nn.Module], run: Callable[[], Tensor | None], counter: LiveBytes | None, device: torch.device
) -> list[Part]:
    marks = _Marks(counter, device)
    with _marked(layers, marks):
        loss = run()
        marks.close(backward=True)
        if loss is not None:
            loss.backward()
            del loss
            marks.close()
    return marks.parts


@contextmanager
def _marked(layers: Sequence[nn.Module], marks: _Marks) -> Iterator[None]:
    """Close a part of ``marks`` wherever a layer begins or ends, forward and backward."""

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        is_tensor = torch.is_tensor(hidden)
        marks.close(index, layer_input=hidden.nbytes if is_tensor else 0)
        if is_tensor and hidden.requires_grad:
            hidden.register_hook(lambda grad: marks.close(None) if marks.layer == index else None)

    def leave(index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        size = marks.layer_input
        marks.close(None)
        if torch.is_tensor(hidden) and hidden.requires_grad:
            hidden.register_hook(lambda grad: marks.close(index, layer_input=size))

    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            before = layer.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: enter(index, args, kwargs), with_kwargs=True
            )
            after = layer.register_forward_hook(lambda _, args, output, index=index: leave(index, output))
            undo.callback(before.remove)
            undo.callback(after.remove)
        yield
