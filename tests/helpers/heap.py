"""Holes in the heap: freed memory that the C library returns to the system only when it is asked to."""

from __future__ import annotations

import ctypes

#: Bytes of all freed blocks together.
HOLE_BYTES = 60_000_000


def hole_below() -> ctypes.Array[ctypes.c_char]:
    """Fill and free blocks of the heap, and return one behind them, which keeps the hole while it is held."""
    blocks = [ctypes.create_string_buffer(b"1" * 60_000) for _ in range(HOLE_BYTES // 60_000)]
    end = ctypes.create_string_buffer(b"1" * 60_000)
    del blocks
    return end
