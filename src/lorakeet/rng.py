"""Capture, restore and preserve the random states of Python, NumPy and torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Capture the state of every generator that training draws from: Python, NumPy, torch on the CPU and on CUDA."""
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state that :func:`random_state` captured."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw every random number inside from ``seed``, and none from the caller; None: from the caller, as without it."""
    if seed is None:
        yield
        return
    with same_random_state():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield


@contextmanager
def same_random_state() -> Iterator[None]:
    """Restore the random state at the end, so that nothing inside draws a random number from the caller."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
