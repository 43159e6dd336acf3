"""The held-out part: by content alone, never a text on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.rows.split import normalized, split_texts
from lorakeet.errors import DataError

WORDS = st.sampled_from(
    ["Bird", "bird", "BIRD ", " bird\n", "song", "two  songs", "two songs", "ﬁne", "fine", "x", "y"]
)
TEXTS = st.lists(st.one_of(WORDS, st.text(min_size=1)), min_size=2)
FRACTIONS = st.floats(0.01, 0.99)


def held_out_texts(texts: list[str], fraction: float, seed: int) -> list[str]:
    return [texts[number] for number in split_texts(texts, fraction, seed).held_out.tolist()]


@settings(deadline=None)
@given(TEXTS, FRACTIONS, st.integers(0, 3))
def test_no_text_on_both_sides_and_no_row_lost(texts: list[str], fraction: float, seed: int) -> None:
    distinct = {normalized(text) for text in texts}
    if len(distinct) < 2:
        with pytest.raises(DataError):
            split_texts(texts, fraction, seed)
        return
    split = split_texts(texts, fraction, seed)
    learned = {normalized(texts[number]) for number in split.train}
    measured = {normalized(texts[number]) for number in split.held_out}
    assert learned and measured and not learned & measured
    train, held_out = split.train.tolist(), split.held_out.tolist()
    assert sorted(train + held_out) == list(range(len(texts)))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert split.distinct == len(distinct)
    assert len(measured) == min(max(1, round(fraction * len(distinct))), len(distinct) - 1)


@settings(deadline=None)
@given(st.data(), TEXTS, FRACTIONS)
def test_the_order_of_the_rows_changes_nothing(data: st.DataObject, texts: list[str], fraction: float) -> None:
    if len({normalized(text) for text in texts}) > 1:
        shuffled = data.draw(st.permutations(texts))
        assert Counter(held_out_texts(texts, fraction, 1)) == Counter(held_out_texts(shuffled, fraction, 1))


@settings(deadline=None)
@given(TEXTS, FRACTIONS, st.integers(0, 3))
def test_the_texts_of_the_lowest_hashes_are_held_out(texts: list[str], fraction: float, seed: int) -> None:
    contents = [hashlib.sha256(normalized(text).encode()).digest() for text in texts]
    lottery = sorted(set(contents), key=lambda content: hashlib.sha256(b"%d:" % seed + content).digest())
    if len(lottery) > 1:
        held_out = lottery[: min(max(1, round(fraction * len(lottery))), len(lottery) - 1)]
        expected = [number for number, content in enumerate(contents) if content in held_out]
        assert split_texts(texts, fraction, seed).held_out.tolist() == expected


def test_repeating_a_text_does_not_change_its_side() -> None:
    texts = [f"text {number}" for number in range(100)]
    once = held_out_texts(texts, 0.2, 7)
    assert held_out_texts(texts + [text.upper() for text in texts[:50]], 0.2, 7)[:20] == once
    assert len(once) == 20


def test_the_seed_chooses() -> None:
    texts = [f"text {number}" for number in range(100)]
    assert held_out_texts(texts, 0.2, 1) == held_out_texts(texts, 0.2, 1) != held_out_texts(texts, 0.2, 2)
    assert split_texts(["a", "b", "A"], 0.0, 1).train.tolist() == [0, 1, 2]
    assert split_texts(["a", "a"], 0.0, 1).held_out.tolist() == []


def test_too_few_texts_to_hold_one_out() -> None:
    with pytest.raises(DataError, match="1 distinct text") as caught:
        split_texts(["Same.", " same.\n"], 0.05, 1)
    assert "data.eval_fraction=0" in str(caught.value.hint)


CLASSES = st.lists(st.tuples(WORDS, st.sets(st.sampled_from("abc"), max_size=2)), min_size=2, max_size=12)


@settings(deadline=None)
@given(CLASSES, FRACTIONS, st.integers(0, 3))
def test_a_class_of_two_texts_is_never_only_held_out(
    rows: list[tuple[str, set[str]]], fraction: float, seed: int
) -> None:
    texts, classes = [text for text, _ in rows], [names for _, names in rows]
    if len({normalized(text) for text in texts}) < 2:
        return
    plain, split = split_texts(texts, fraction, seed), split_texts(texts, fraction, seed, classes)
    assert set(plain.train) <= set(split.train) and len(split.held_out)
    assert sorted([*split.train, *split.held_out]) == list(range(len(texts)))
    assert not {normalized(texts[n]) for n in split.train} & {normalized(texts[n]) for n in split.held_out}
    known = {name for number in split.train for name in classes[number]}
    for name in "abc":
        having = {normalized(text) for text, names in rows if name in names}
        held_out = {normalized(texts[number]) for number in split.held_out}
        if len(having) > 1 or (having and held_out != having):
            assert name in known
    if all(known >= names for names in classes) and known == {n for i in plain.train for n in classes[i]}:
        assert split.held_out.tolist() == plain.held_out.tolist()  # nothing is given back without need
