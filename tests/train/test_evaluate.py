"""Held-out loss does not depend on the batch size, and equals that of one sample at a time and of the Trainer."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.tiny_training import END, PAD, tiny_data, tiny_llama, tiny_peft
from lorakeet.data.collate import PaddingCollator
from lorakeet.errors import DataError
from lorakeet.patches import causal_loss as module
from lorakeet.train.evaluate import evaluate


def one_at_a_time(model, dataset):
    total = tokens = 0
    model.eval()
    for row in dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.double()
        total += float(loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens, tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_equals_one_sample_at_a_time(batch_size, collator):
    model, data = tiny_llama(initializer_range=0.3), tiny_data(19)
    loss, tokens = one_at_a_time(model, data)
    found = evaluate(model, data, collator, batch_size)
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(loss, abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert evaluate(model, list(data), collator, batch_size) == found  # a plain list of rows as well


def test_long_samples_are_summed_over_chunks(collator, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    model, data = tiny_llama(initializer_range=0.3), tiny_data(7)
    assert evaluate(model, data, collator, 7)["loss"] == pytest.approx(one_at_a_time(model, data)[0], abs=1e-6)


def test_the_end_token_counts_even_where_it_is_the_padding():
    model, data = tiny_llama(initializer_range=0.3), tiny_data(9)
    assert all(row["input_ids"][-1] == END for row in data)
    with_end = evaluate(model, data, PaddingCollator(END), 4)
    assert with_end == evaluate(model, data, PaddingCollator(PAD), 4)
    assert with_end["tokens"] == sum(len(row["input_ids"]) - 1 for row in data)


def test_training_mode_and_random_state_are_restored(collator):
    model = tiny_peft(dropout=0.5)
    model.train()
    before = torch.get_rng_state()
    first = evaluate(model, tiny_data(5), collator)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    assert evaluate(model, tiny_data(5), collator) == first  # no dropout


def test_progress_counts_rows(collator):
    seen = []
    evaluate(tiny_llama(), tiny_data(7), collator, 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_nothing_to_evaluate_is_an_error(collator):
    with pytest.raises(DataError, match="no samples"):
        evaluate(tiny_llama(), tiny_data(0), collator)
    with pytest.raises(DataError, match="no token"):
        evaluate(tiny_llama(), [{"input_ids": [5]}], collator)
