"""Cost of one pass: its parts in order, each with the bytes that it keeps, its peak and its seconds.

A pass is a row of parts: what comes before the layers, each layer, the loss, and the same backwards. From them follow the
peak of live bytes and the seconds, with any choice of checkpointed layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

#: Tensors as large as a layer's input that its second run holds beyond the first one: its output, and the gradient of that.
SECOND_RUN = 2


@dataclass(frozen=True)
class Part:
    """A part of a pass.

    Attributes:
        kept: Bytes that are alive after the part and were not before it; negative where more are freed.
        peak: Most bytes alive during the part, beyond those before it.
        seconds: Time that it takes.
        layer: Number of the layer that it belongs to; None: outside of the layers.
        backward: Whether it belongs to the backward pass.
        layer_input: Bytes of the layer's input, which is all that a checkpointed layer keeps.
    """

    kept: int
    peak: int
    seconds: float = 0.0
    layer: int | None = None
    backward: bool = False
    layer_input: int = 0

    def then(self, other: Part) -> Part:
        """Return this part and the next one as one part."""
        peak = max(self.peak, self.kept + other.peak)
        return replace(self, kept=self.kept + other.kept, peak=peak, seconds=self.seconds + other.seconds)


@dataclass(frozen=True)
class PassCost:
    """Cost of a pass over a number of tokens.

    Attributes:
        tokens: Real tokens of the pass.
        parts: Its parts in order, those of every layer among them.
    """

    tokens: int
    parts: tuple[Part, ...]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len({part.layer for part in self.parts if part.layer is not None})

    def peak(self, every: int | None = None) -> int:
        """Return the most bytes that are alive in the pass, weights not counted.

        Args:
            every: Layers 0, n, 2n, … are checkpointed; None: no layer is.
        """
        now = most = 0
        for part in self._with_checkpoints(every):
            most = max(most, now + part.peak)
            now += part.kept
        return most

    def kept(self, every: int | None = None) -> int:
        """Return the bytes that the forward pass keeps for the backward pass."""
        return sum(part.kept for part in self._with_checkpoints(every) if not part.backward)

    def peak_outside(self) -> int:
        """Return the peak of the parts outside of the layers, beyond what is alive before each: logits and their loss."""
        return max((part.peak for part in self.parts if part.layer is None), default=0)

    def seconds(self, every: int | None = None) -> float:
        """Return the time of the pass."""
        return sum(part.seconds for part in self._with_checkpoints(every))

    def grown(self, factor: float, few_logits: bool = False) -> PassCost:
        """Return the cost of a pass of more tokens of the same kind.

        Args:
            factor: Its tokens, relative to those of this one.
            few_logits: The loss holds no more logits at a time, however many tokens there are.
        """
        if factor == 1:
            return self
        parts = []
        for part in self.parts:
            outside = few_logits and part.layer is None
            parts.append(
                replace(
                    part,
                    kept=int(part.kept * factor),
                    peak=part.peak if outside else int(part.peak * factor),
                    seconds=part.seconds * factor,
                    layer_input=int(part.layer_input * factor),
                )
            )
        return PassCost(int(self.tokens * factor), tuple(parts))

    def _with_checkpoints(self, every: int | None) -> Iterator[Part]:
        forward = {part.layer: part for part in self.parts if not part.backward}
        backward = {part.layer: part for part in self.parts if part.backward}
        for part in self.parts:
            if every is None or part.layer is None or part.layer % every or part.layer not in backward:
                yield part
                continue
            first, size = forward[part.layer], part.layer_input
            stays = max(first.kept + backward[part.layer].kept, 0)  # workspaces, made once and never freed
            if not part.backward:
                yield replace(part, kept=size + stays)
            else:  # the layer runs forward again, keeps what it keeps, and then runs backward
                again = first.kept - stays
                yield replace(
                    part,
                    kept=part.kept + again - size,
                    peak=max(first.peak - stays, again + part.peak) + SECOND_RUN * size,
                    seconds=part.seconds + first.seconds,
                )


def seconds_of(tokens: Iterable[int], costs: Iterable[PassCost], every: int | None = None) -> float:
    """Return the time of passes with these tokens, by straight lines between the passes that were measured.

    Args:
        tokens: Tokens of each pass.
        costs: Costs of measured passes.
        every: Layers 0, n, 2n, … are checkpointed; None: no layer is.
    """
    points = sorted({cost.tokens: cost.seconds(every) for cost in costs}.items())
    return sum(_on_line(points, each) for each in tokens)


def _on_line(points: list[tuple[int, float]], tokens: int) -> float:
    if len(points) == 1:
        return points[0][1] * tokens / max(points[0][0], 1)
    pairs = list(pairwise(points))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if tokens <= pair[1][0]), pairs[-1])
    return max(y0 + (y1 - y0) * (tokens - x0) / (x1 - x0), 0.0)


def choose_every(cost: PassCost, available: float) -> int | None:
    """Choose n so that the pass fits with layers 0, n, 2n, … checkpointed, as few as possible; None: no layer has to be.

    Args:
        cost: Cost of the largest pass.
        available: Bytes that it may take.

    Returns:
        n; 1 also where not even that fits.
    """
    if cost.peak() <= available or not cost.layers:
        return None
    return next((n for n in range(cost.layers, 1, -1) if cost.peak(n) <= available), 1)
