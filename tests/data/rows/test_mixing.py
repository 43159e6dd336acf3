"""Several sources in given shares: which rows are drawn, and the message about the rest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.config import DataSettings
from lorakeet.data.rows.load import Rows, read_rows
from lorakeet.data.rows.mixing import draw, interleave, shares
from lorakeet.errors import DataError

Put = Callable[..., Path]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.05, 10)), min_size=1, max_size=5),
    st.integers(0, 9),
    st.none() | st.integers(1, 500),
)
def test_shares_are_kept_until_one_source_is_exhausted(
    sources: list[tuple[int, float]], seed: int, limit: int | None
) -> None:
    counts, weights = zip(*sources, strict=True)
    parts = [weight / sum(weights) for weight in weights]
    drawn = draw(counts, parts, seed, limit)
    taken = [len(rows) for rows in drawn]
    for rows, count in zip(drawn, counts, strict=True):
        assert len(set(rows.tolist())) == len(rows) and all(0 <= row < count for row in rows)  # none twice
    total = min(count / part for count, part in zip(counts, parts, strict=True))
    if limit is None or limit >= total:
        assert any(take == count for take, count in zip(taken, counts, strict=True))  # one is exhausted
    else:
        assert limit - len(parts) < sum(taken) <= limit
    for take, part in zip(taken, parts, strict=True):
        assert abs(take - part * min(total, limit or total)) < 1
    order = interleave(drawn, counts, seed)
    assert sorted(order) == sorted(row + sum(counts[:at]) for at, rows in enumerate(drawn) for row in rows.tolist())


def test_the_draw_is_by_seed() -> None:
    first, again, other = (draw([100, 100], [0.5, 0.5], seed, 60) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[0], first[1])
    assert interleave(first, [100, 100], 1) != interleave(first, [100, 100], 2)


def mixed(put: Put, counts: list[int], weights: list[float], seed: int = 0, limit: int | None = None) -> Rows:
    paths = [
        str(put(f"{name}.jsonl", "\n".join(json.dumps({"text": f"{name} {row}"}) for row in range(count))))
        for name, count in zip("abc", counts, strict=False)
    ]
    return read_rows(DataSettings(path=paths, weights=weights, limit=limit), seed=seed)


def test_rows_are_drawn_in_shares_and_mixed(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lorakeet")
    rows = mixed(put, [90, 100], [9, 1])
    texts = rows.data["text"][:]
    assert Counter(text[0] for text in texts) == {"a": 90, "b": 10}
    assert len(set(texts)) == 100 and "b" in {text[0] for text in texts[:30]}
    assert "a.jsonl" in rows.description and "10 of 100 rows of" in rows.description
    assert "the rest is left out to keep the shares of data.weights" in caplog.text
    assert texts == mixed(put, [90, 100], [9, 1]).data["text"][:]
    assert texts != mixed(put, [90, 100], [9, 1], seed=1).data["text"][:]
    assert rows.data.info.description == rows.description


def test_nothing_is_said_where_nothing_is_left_out(put: Put, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lorakeet")
    assert len(mixed(put, [30, 10], [3, 1]).data) == 40
    assert not caplog.text


def test_a_limit_counts_after_the_draw(put: Put) -> None:
    texts = mixed(put, [90, 100], [1, 1], limit=20).data["text"][:]
    assert Counter(text[0] for text in texts) == {"a": 10, "b": 10}


def test_a_folder_is_one_path(put: Put) -> None:
    folder = put("all/a.txt", "a\n" * 10).parent
    put("all/b.txt", "b\n" * 10)
    other = put("c.txt", "c\n" * 10)
    rows = read_rows(DataSettings(path=[str(folder), str(other)], weights=[2, 1]))
    assert Counter(rows.data["text"][:])["c"] == 10 and len(rows.data) == 30


@pytest.mark.parametrize(("path", "weights"), [(["a", "b"], [1]), (["a"], [1, 1]), ("a", [1, 1]), (None, [1, 2])])
def test_there_is_one_weight_for_each_path(path: list[str] | str | None, weights: list[float]) -> None:
    settings = DataSettings(path=path, weights=weights)
    with pytest.raises(DataError, match="expected one weight for each path"):
        read_rows(settings)
    with pytest.raises(DataError):
        shares(settings)


def test_weights_that_leave_nothing(put: Put) -> None:
    with pytest.raises(DataError, match="nothing is left of mixed: 0 of 1 rows"):
        mixed(put, [1, 1], [1, 1], limit=1)
