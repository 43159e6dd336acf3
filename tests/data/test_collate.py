"""The collator against a loop anyone can check, and its counts under every way to cut the same samples into batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data import PaddingCollator
from lorakeet.errors import DataError

IDS = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@settings(deadline=None)
@given(st.lists(IDS, min_size=1, max_size=6), st.integers(0, 5))
def test_like_a_slow_loop(samples: list[list[int]], pad: int) -> None:
    longest = max(map(len, samples))
    input_ids, mask, labels = [], [], []
    for ids in samples:
        row, seen, learned = [], [], []
        for at in range(longest):
            inside = at < len(ids)
            row.append(ids[at] if inside else pad)
            seen.append(1 if inside else 0)
            learned.append(ids[at] if inside else -100)
        input_ids.append(row)
        mask.append(seen)
        labels.append(learned)
    batch = PaddingCollator(pad)([{"input_ids": ids, "length": len(ids)} for ids in samples])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_labels_of_a_sample_are_kept() -> None:
    samples = [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": torch.tensor([4])}]
    batch = PaddingCollator(0)(samples)
    assert batch["labels"].tolist() == [[-100, -100, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_as_many_targets_however_the_samples_are_batched(size: int) -> None:
    samples = [{"input_ids": [2] * (1 + number % 7)} for number in range(16)]
    batches = [PaddingCollator(2)(samples[at : at + size]) for at in range(0, 16, size)]
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert targets == sum(len(sample["input_ids"]) - 1 for sample in samples)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([], "no samples"),
        ([{"input_ids": [1]}, {"input_ids": []}], "sample 1 of a batch has no tokens"),
        ([{"input_ids": [1, 2], "labels": [1]}], "1 labels, expected 2, one per token"),
    ],
)
def test_what_cannot_be_a_batch(samples: list[dict[str, list[int]]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        PaddingCollator(0)(samples)
