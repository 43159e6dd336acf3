"""Buffers that passes use again, and no other tensor's memory."""

from __future__ import annotations

from lorakeet.kernels.cpu.memory import BufferPool
from lorakeet.plan.live_bytes import LiveBytes


def test_a_buffer_is_used_again_once_nothing_refers_to_it() -> None:
    pool = BufferPool()
    first, second = pool.empty(100), pool.empty(100)
    addresses = {first.data_ptr(), second.data_ptr()}
    view = first[3:5].view(2, 1)
    del first, second
    third = pool.empty(80)  # the other one: a view of the first is alive
    assert third.data_ptr() in addresses and third.data_ptr() != view.data_ptr() - 12
    del view
    assert {third.data_ptr(), pool.empty(100).data_ptr()} == addresses


def test_free_buffers_make_room_for_larger_ones() -> None:
    pool = BufferPool()
    taken = [pool.empty(10) for _ in range(3)]
    del taken[1:]
    assert pool.empty(20).shape == (20,) and len(pool._buffers) == 2
    assert taken[0].numel() == 10


def test_a_mode_that_counts_bytes_sees_every_tensor() -> None:
    pool = BufferPool()
    pool.empty(1000)
    with LiveBytes() as counter:
        mine = pool.empty(1000)
    assert counter.now == mine.nbytes == 4000
