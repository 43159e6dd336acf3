"""Resident memory of this process: what grows it, its peak, and what is returned."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.heap import HOLE_BYTES, hole_below
from lorakeet.runs.process_memory import peak_rss_bytes, resident_bytes, return_free_memory


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = b"1" * 2**26
    assert resident_bytes() - before > 0.9 * len(held)


def test_peak_memory_never_falls() -> None:
    before = peak_rss_bytes()
    block = bytearray(before + 2**25)
    assert peak_rss_bytes() >= len(block)
    del block
    assert peak_rss_bytes() >= before + 2**25


@pytest.mark.skipif(sys.platform != "linux", reason="other systems return it by themselves")
def test_free_memory_between_what_is_used_is_returned() -> None:
    """Small blocks come from the heap, whose end is still in use."""
    end = hole_below()
    before = resident_bytes()
    return_free_memory()
    assert before - resident_bytes() > 0.7 * HOLE_BYTES and end.raw[0] == b"1"[0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems choose by themselves")
def test_a_large_block_leaves_no_hole_when_it_is_freed() -> None:
    """In a process of its own, where a freed block of 16 MiB would teach the library to keep such blocks in the heap."""
    script = """
import ctypes
from lorakeet.runs.process_memory import map_large_blocks, resident_bytes
map_large_blocks()
make = lambda size: ctypes.create_string_buffer(b"1" * size)
del (large := [make(2**24)])[:]
before, blocks = resident_bytes(), []
for _ in range(4):
    blocks.append((make(2**24), make(50_000)))
blocks = [small for _, small in blocks]
assert resident_bytes() - before < 2**24, resident_bytes() - before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems choose by themselves")
def test_threads_take_memory_from_one_heap() -> None:
    """In a process of its own, since the setting stays."""
    script = """
import ctypes, sys, threading
from lorakeet.runs.process_memory import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
made = []
thread = threading.Thread(target=lambda: made.append(ctypes.create_string_buffer(60_000)))
thread.start()
thread.join()
heaps = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.strip().endswith("[heap]")]
inside = any(int(start, 16) <= ctypes.addressof(made[0]) < int(end, 16) for start, end in heaps)
assert inside == (sys.argv[1] == "shared"), (heaps, hex(ctypes.addressof(made[0])))
"""
    for how in ("shared", "apart"):
        subprocess.run([sys.executable, "-c", script, how], check=True)
