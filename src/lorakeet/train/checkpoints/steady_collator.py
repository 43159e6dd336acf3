"""Collator whose random numbers a resumed run draws again."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lorakeet.rng import same_random_state


class SteadyCollator:
    """Collator whose random numbers depend on seed, epoch and samples alone.

    A collator that masks or crops at random thus does the same in a resumed run, although batches are fetched ahead.
    Dropout does not depend on the collator.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], seed: int) -> None:
        self.collator, self.seed, self.epoch = collator, seed, 0

    def __call__(self, samples: list[Any]) -> Any:
        seed = zlib.crc32(repr((self.seed, self.epoch, samples)).encode())
        with same_random_state():
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            return self.collator(samples)
