"""The attention pattern of a sample: which positions see which, and how scores become weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Attention inside one sample.

    Attributes:
        causal: Position i sees j ≤ i alone.
        window: Positions. Causal: i sees i - window < j ≤ i; else abs(i - j) ≤ window. None: no limit.
        softcap: t in t·tanh(score / t). None: scores are not capped.
        dropout: Probability that a weight is dropped; drawn from torch's default generator.
    """

    causal: bool
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        """Return [length, length] bool, True where row sees column; None where ``causal`` alone decides."""
        if self.window is None or length <= self.window:
            return None
        positions = torch.arange(length, device=device)
        distance = positions[:, None] - positions[None, :]
        if self.causal:
            return (distance >= 0) & (distance < self.window)
        return distance.abs() <= self.window

    def window_size(self) -> tuple[int, int]:
        """Return how many positions before and after its own a position sees, as FlashAttention counts; -1: all."""
        if self.causal:
            return (-1 if self.window is None else self.window - 1), 0
        return (-1, -1) if self.window is None else (self.window, self.window)
