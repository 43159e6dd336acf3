"""Pages and the prefix cache: counts, chains, and what is dropped first."""

from __future__ import annotations

import pytest
import torch

from lorakeet.runs.process_memory import resident_bytes
from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.cache.prefix_cache import PrefixCache, chain, prefix_root

ROOT = prefix_root("base", "adapter", 1.0)


def filled(cache: PrefixCache, tokens: list[int]) -> list[bytes]:
    """Keep the pages of a sequence that has ended."""
    keys = chain(ROOT, tokens, 2)
    pages = cache.pages.take(len(keys))
    cache.keep(keys, pages)
    for page in pages:
        cache.pages.release(page)
    return keys


def test_roots_differ() -> None:
    roots = [prefix_root("base", *rest) for rest in (("", 1.0), ("a", 1.0), ("b", 1.0), ("a", 0.5))]
    assert len({prefix_root("other", "", 1.0), *roots}) == 5


def test_chain() -> None:
    keys = chain(ROOT, [1, 2, 3, 4, 5], 2)
    assert len(keys) == 2 and keys == chain(ROOT, [1, 2, 3, 4], 2)
    assert chain(ROOT, [9, 2, 3, 4], 2)[1] != keys[1]  # a page depends on all before it
    assert chain(prefix_root("base", "b", 1.0), [1, 2], 2)[0] != keys[0]


def test_find() -> None:
    cache = PrefixCache(Pages(1, 8, 1, 2, 4))
    keys = filled(cache, [1, 2, 3, 4])
    found = cache.find(chain(ROOT, [1, 2, 7, 8], 2))
    assert len(found) == 1 and cache.pages.references(found[0]) == 2
    assert cache.find(keys[1:]) != [] and not cache.find(chain(ROOT, [3, 4], 2))


def test_oldest_first() -> None:
    cache = PrefixCache(Pages(1, 6, 1, 2, 4))
    old, new = filled(cache, [1, 2, 3, 4]), filled(cache, [5, 6, 7, 8])
    assert cache.make_room(3)
    assert [cache.has(key) for key in (*old, *new)] == [True, False, True, True]  # the end of the older chain
    for page in cache.find(old[:1]):
        cache.pages.release(page)
    assert cache.make_room(4) and cache.has(old[0]) and not cache.has(new[1])
    assert cache.make_room(6) and len(cache) == 0


def test_pages_in_use_stay() -> None:
    cache = PrefixCache(Pages(1, 2, 1, 2, 4))
    keys = filled(cache, [1, 2])
    held = cache.find(keys)
    assert not cache.make_room(2) and cache.has(keys[0])
    cache.pages.release(held[0])
    assert cache.make_room(2)


def test_limit() -> None:
    cache = PrefixCache(Pages(1, 8, 1, 2, 4), limit=3)
    filled(cache, list(range(8)))
    assert len(cache) == 3 and cache.pages.free == 5


def test_double_release() -> None:
    pages = Pages(1, 2, 1, 2, 4)
    [page] = pages.take(1)
    pages.release(page)
    with pytest.raises(ValueError, match="free already"):
        pages.release(page)
    with pytest.raises(ValueError, match="is free"):
        pages.share(page)


def test_taken_pages_are_zero() -> None:
    pages = Pages(1, 1, 1, 2, 4)
    pages.keys[:, pages.take(1)] = float("nan")
    pages.release(0)
    assert pages.keys[:, pages.take(1, clear=False)].isnan().all()
    pages.release(0)
    assert not pages.keys[:, pages.take(1)].any()


def test_a_pool_takes_no_memory_before_it_is_used() -> None:
    before = resident_bytes()
    pages = Pages(1, 8, 1, 16, 1 << 18, torch.bfloat16)
    assert resident_bytes() - before < pages.keys.nbytes / 4 and pages.keys.nbytes == 8 * 16 << 19
    assert not pages.keys.is_inference() and not bool(pages.values[0, 3].any()) and pages.keys.dtype == torch.bfloat16
