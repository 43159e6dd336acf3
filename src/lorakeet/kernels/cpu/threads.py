"""Waiting time of threads without work, in the OpenMP runtime that the compiled loops share with torch.

A step has thousands of parallel loops. A thread that ends its share waits for the others in a loop of its own, which saves
the time of waking up. Where another program needs the processor, that loop takes its time away from the very thread that all
wait for. libgomp reads the setting once, when torch loads it.
"""

from __future__ import annotations

import os
import sys

#: Turns of the waiting loop, about a tenth of a millisecond: longer than Python needs between two loops. libgomp's own
#: choice is some milliseconds.
SPINS = 5000
#: Variables of libgomp that say how long to wait.
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_waiting() -> None:
    """Let threads wait awake for :data:`SPINS` turns, unless the user chose otherwise; call it before torch is imported."""
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def waiting() -> str:
    """Return how long threads wait awake, as the variables say it."""
    said = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return " ".join(said) or "as long as libgomp chooses; slow beside other programs, see GOMP_SPINCOUNT"
