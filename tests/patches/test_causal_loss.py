"""Loss of a causal language model: label shift, targets of a batch, loss of each row."""

from __future__ import annotations

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

from helpers.tiny_training import tiny_llama
from lorakeet.patches.causal_loss import count_targets, sample_losses, shifts_labels


def test_masked_labels_do_not_count(collator):
    ids = list(range(2, 10))
    rows = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]}, {"input_ids": ids[:5]}]
    losses, targets = sample_losses(tiny_llama(), collator(rows))
    assert targets.tolist() == [4, 4]
    assert (losses > 0).all()


def test_a_large_vocabulary_is_summed_exactly(collator):
    """Many small terms next to a large one are lost if they are summed one by one in fp32."""
    scores = torch.zeros(1, 9, 200_000)
    scores[..., 0] = 17.0  # e^-17 is below half a unit of rounding of 1; 200,000 of them are 0.8 %

    class Fixed(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=scores)

    ids = torch.arange(9)[None]
    found, _ = sample_losses(Fixed(), {"input_ids": ids, "labels": ids})
    right = torch.nn.functional.cross_entropy(scores[0, :-1].double(), ids[0, 1:], reduction="sum")
    assert float(found) == pytest.approx(float(right), abs=8 * 3e-6)


def test_what_counts_as_a_target():
    assert shifts_labels(tiny_llama())
    bert = BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    assert not shifts_labels(bert) and not shifts_labels(t5)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1))
    assert shifts_labels(gpt2)  # its class name has no loss type
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
