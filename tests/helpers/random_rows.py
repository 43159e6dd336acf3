"""Random token rows and their collator."""

from __future__ import annotations

import torch


def rows(vocabulary: int, count: int = 80) -> list[dict[str, list[int]]]:
    g = torch.Generator().manual_seed(4)
    lengths = torch.randint(5, 24, (count,), generator=g).tolist()
    ids = [torch.randint(2, vocabulary, (length,), generator=g).tolist() for length in lengths]
    return [{"input_ids": one} for one in ids]


def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    pad = [longest - len(row["input_ids"]) for row in batch]
    ids = [row["input_ids"] for row in batch]
    return {
        "input_ids": torch.tensor([one + [1] * n for one, n in zip(ids, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * n for one, n in zip(ids, pad, strict=True)]),
        "labels": torch.tensor([one + [-100] * n for one, n in zip(ids, pad, strict=True)]),
    }
