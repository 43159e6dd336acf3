"""Held-out loss is one number: the same one sample at a time, in any batch size, and from the Trainer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.tiny_training import END, PAD, tiny_data, tiny_llama, tiny_peft
from lorakeet.data.collate import PaddingCollator
from lorakeet.errors import DataError
from lorakeet.patches import causal_loss as module
from lorakeet.patches.causal_loss import count_targets, sample_losses, shifts_labels
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


def test_masked_labels_do_not_count(collator):
    ids = list(range(2, 10))
    rows = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]}, {"input_ids": ids[:5]}]
    losses, targets = sample_losses(tiny_llama(), collator(rows))
    assert targets.tolist() == [4, 4]
    assert (losses > 0).all()
    assert evaluate(tiny_llama(), rows, collator)["tokens"] == 8


def test_a_large_vocabulary_is_summed_exactly(collator):
    """Many small terms beside a large one: added up one by one in fp32, they are lost."""
    scores = torch.zeros(1, 9, 200_000)
    scores[..., 0] = 17.0  # e^-17 is less than half of what 1 can be raised by; 200,000 of them are 0.8 %

    class Fixed(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=scores)

    ids = torch.arange(9)[None]
    found, _ = sample_losses(Fixed(), {"input_ids": ids, "labels": ids})
    right = torch.nn.functional.cross_entropy(scores[0, :-1].double(), ids[0, 1:], reduction="sum")
    assert float(found) == pytest.approx(float(right), abs=8 * 3e-6)


def test_leaves_mode_and_random_numbers_as_they_were(collator):
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


def test_what_counts_as_a_target():
    assert shifts_labels(tiny_llama())
    bert = BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    assert not shifts_labels(bert) and not shifts_labels(t5)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1))
    assert shifts_labels(gpt2)  # a name that tells nothing
    assert shifts_labels(
        peft.get_peft_model(gpt2, peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True))
    )
    assert not shifts_labels(
        BertForPreTraining(BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    )
    labels = torch.tensor([[3, -100, 5], [-100, 4, 4]])
    assert count_targets({"labels": labels}, shifted=False) == 4
    assert count_targets({"labels": labels}, shifted=True) == 3
    assert count_targets({"labels": labels, "shift_labels": labels[:, :1]}, shifted=True) == 1
    assert count_targets({"labels": torch.tensor([0, 1, 1])}, shifted=False) == 3
    assert count_targets({"start_positions": torch.tensor([2, 3])}, shifted=False) == 2
