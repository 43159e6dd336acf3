"""The patches of a training together, as its settings ask for them: no padding, no logits, fused layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from lorakeet.config import TrainSettings
from lorakeet.log import info
from lorakeet.patches.fused_decoder import why_unfused
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.padding_free import padding_free, why_padded


@contextmanager
def training_patches(model: nn.Module, train: TrainSettings) -> Iterator[None]:
    """Make ``model`` train as the settings say; layers skip padding where that is proven to change nothing else."""
    with ExitStack() as patches:
        if train.padding_free and (reason := why_padded(model)):
            info(f"padding    is computed: {reason}")
        elif train.padding_free:
            patches.enter_context(padding_free(model))
        if train.fused_loss:
            patches.enter_context(fused_loss(model))
        if train.fused_layers:
            patches.enter_context(fused_layers(model))
            if reason := why_unfused(model):
                info(f"layers     are computed module by module: {reason}")
        yield
