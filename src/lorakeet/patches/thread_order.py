"""Training and evaluation of a model whose bits the number of threads does not change, or with the number that it had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lorakeet.kernels.cpu import features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.fixed_order import fixed_order
from lorakeet.log import info
from lorakeet.quant.protocol import computing_dtypes

_HALF = {torch.bfloat16, torch.float16}


@contextmanager
def in_fixed_order(model: nn.Module) -> Iterator[None]:
    """Compute sums of a model on a CPU in one order, whatever the number of threads (:func:`fixed_order`)."""
    if not any(p.is_cpu for p in model.parameters()):
        yield
        return
    with fixed_order(half_precision=bool(computing_dtypes(model) & _HALF)):
        yield


def why_threads_matter(model: nn.Module) -> str | None:
    """Return why the bits of a model on a CPU may depend on the number of threads, in half a sentence; None if not."""
    if not any(p.is_cpu for p in model.parameters()):
        return None
    if bool(computing_dtypes(model) & _HALF):
        return "torch's products in half precision choose their blocks by it"
    if not features.has(Feature.AVX2):
        return "without AVX2 or a C compiler torch's products choose their blocks by it"
    return None


def keep_threads(model: nn.Module, threads: int) -> None:
    """Use the number of threads that a run had before it was stopped, where its bits may depend on it."""
    reason = why_threads_matter(model)
    if reason and threads != torch.get_num_threads():
        info(f"threads    {threads}, as before the stop, not {torch.get_num_threads()}: {reason}")
        torch.set_num_threads(threads)
