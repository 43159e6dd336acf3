"""Errors of torch and Python when memory runs out, as one error that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lorakeet.errors import LorakeetError, TrainingError

#: Texts of the errors that torch raises without a class of their own: its CPU allocator, mmap, cuBLAS and cuDNN.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator|not enough memory|can't allocate memory|out of memory|Cannot allocate memory|ALLOC_FAILED"
)
#: Changes that lower the need of memory, the cheapest first.
ADVICE = (
    "lower train.token_budget, train.batch_size or data.max_length, set train.gradient_checkpointing=true or --bits 8; "
    "`lorakeet plan --fit` chooses"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    own = isinstance(error, LorakeetError)
    return isinstance(error, (RuntimeError, OSError)) and not own and bool(_OUT_OF_MEMORY.search(str(error)))


@contextmanager
def memory_errors(during: Callable[[], str]) -> Iterator[None]:
    """Turn an error of lacking memory into a TrainingError with advice.

    Args:
        during: Says what was done, such as ``step 3 of 9``; called when memory runs out.

    Raises:
        TrainingError: Memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        wanted = f" ({size} more asked for)" if (size := _asked_for(str(error))) else ""
        raise TrainingError(f"memory ran out during {during()}{wanted}", ADVICE) from error


def _asked_for(message: str) -> str | None:
    """Return the size that torch could not allocate; None if its message has none."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) ?(\w+)", message)
    if not found:
        return None
    return f"{float(found[1]) / 1e9:,.1f} GB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
