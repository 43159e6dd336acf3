"""Fixtures of the 8-bit products: every registered back end that multiplies on this machine's CPU is tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from lorakeet.kernels.cpu.gemm import GEMV_TOKENS
from lorakeet.kernels.int8 import registry


def cpu_back_ends() -> list[str]:
    """List the names of the back ends that can multiply many tokens on this CPU, slow ones included."""
    x, weight = torch.empty(GEMV_TOKENS + 1, 1), torch.empty(1, 1, dtype=torch.int8)
    return [i.name for i in registry.implementations() if registry.missing(i) is None and i.supports(x, weight)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes ``back_end`` once with each of them."""
    if "back_end" in metafunc.fixturenames:
        metafunc.parametrize("back_end", cpu_back_ends(), indirect=True)


@pytest.fixture
def back_end(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the back end that multiplies."""
    with registry.using(request.param):
        yield request.param


@pytest.fixture
def use_back_end() -> Iterator[Callable[[str], None]]:
    """A function that names the back end for the rest of the test."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(registry.using(name))
