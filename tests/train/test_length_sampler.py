"""Samples sorted by length within a step: the same samples in every step, the same losses, less padding."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny_training import PAD, tiny_data, tiny_peft
from lorakeet import Trainer
from lorakeet.data.collate import PaddingCollator
from lorakeet.train.length_sampler import LengthWindows


@given(lengths=st.lists(st.integers(1, 99), max_size=60), size=st.integers(1, 17))
def test_every_window_keeps_its_samples(lengths, size):
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    sampler = LengthWindows(order, lengths, size)
    rows = list(sampler)
    assert len(sampler) == len(rows)
    for start in range(0, len(order), size):
        window = rows[start : start + size]
        assert sorted(window) == sorted(order[start : start + size])
        assert [lengths[row] for row in window] == sorted((lengths[row] for row in window), reverse=True)


def train(data, make_args):
    seen = []

    class Watching(PaddingCollator):
        def __call__(self, samples):
            batch = super().__call__(samples)
            seen.append((sorted(len(s["input_ids"]) for s in samples), batch["input_ids"].numel()))
            return batch

    args = make_args(max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = Trainer(tiny_peft(dropout=0.0), args, train_dataset=data, data_collator=Watching(PAD))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    steps = [sorted(n for batch, _ in seen[i : i + 4] for n in batch) for i in range(0, 32, 4)]
    return losses, steps, sum(cells for _, cells in seen)


def test_same_losses_with_less_padding_over_several_epochs(make_args):
    data = tiny_data(64)  # eight steps an epoch
    plain, plain_steps, plain_cells = train(data, make_args)
    lengths = [len(ids) for ids in data["input_ids"]]
    grouped, grouped_steps, grouped_cells = train(data.add_column("length", lengths), make_args)
    assert len(plain) == 12 and grouped == pytest.approx(plain, abs=1e-5)
    assert grouped_steps == plain_steps
    assert grouped_cells < 0.9 * plain_cells
