"""A rounded vocabulary that is resized: new rows are rounded, old ones stay, and what shares a weight goes on sharing it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from helpers.tiny import ARCHITECTURES, make
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.errors import BaseModelError
from lorakeet.lora.config import LoraConfig
from lorakeet.quant.hf_quantizer import Int8Config
from lorakeet.quant.int8 import Int8Embedding, Int8Linear
from lorakeet.quant.quantize import quantize_

IDS = torch.tensor([[5, 6, 7, 8]])


def rounded(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model in 8 bits with a vocabulary of 61, and what it is asked."""
    if name != "t5":
        model, asked = make(name), {"input_ids": IDS}
    else:
        config = tf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
        model, asked = tf.T5ForConditionalGeneration(config).eval(), {"input_ids": IDS, "decoder_input_ids": IDS}
    quantize_(model.requires_grad_(False))
    return model, asked


@pytest.mark.parametrize("name", [*ARCHITECTURES, "t5"])
def test_old_tokens_stay_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, asked = rounded(name)
    before, layers = model(**asked).logits, type(model.get_output_embeddings())
    old = model.get_input_embeddings()
    for rows, settings in ((70, {}), (66, {}), (None, {"pad_to_multiple_of": 16}), (90, {"mean_resizing": False})):
        embedding = model.resize_token_embeddings(rows, **settings)
        wanted = rows or 80
        assert embedding is model.get_input_embeddings() and isinstance(embedding, Int8Embedding)
        assert len(embedding.weight) == len(embedding.scale) == embedding.num_embeddings == wanted
        assert model.config.vocab_size == wanted
        head = model.get_output_embeddings()
        assert type(head) is layers
        if head is not None:
            assert head.weight is embedding.weight and head.scale is embedding.scale
            assert head.out_features == wanted
        assert torch.equal(embedding.weight[:61], old.weight) and torch.equal(embedding.scale[:61], old.scale)
        after = model(**asked).logits
        assert torch.allclose(after[..., :61], before[..., :61], atol=1e-6)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert float(embedding(torch.tensor([88])).abs().max()) > 0
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.allclose(again(**asked).logits, after, atol=1e-6)
    again.resize_token_embeddings(61)
    assert torch.allclose(again(**asked).logits, before, atol=1e-6)


def test_a_base_in_half_precision() -> None:
    model = make("llama").bfloat16().requires_grad_(False)
    quantize_(model)
    old = model.get_input_embeddings()
    made = model.resize_token_embeddings(67)
    assert torch.equal(made.weight[:61], old.weight) and torch.equal(made.scale[:61], old.scale)
    assert made.dtype == model(IDS).logits.dtype == torch.bfloat16


def test_new_rows_are_what_a_full_base_would_give_them() -> None:
    full, (model, _) = make("llama"), rounded("llama")
    torch.manual_seed(3)
    full.resize_token_embeddings(70, mean_resizing=False)
    torch.manual_seed(3)
    model.resize_token_embeddings(70, mean_resizing=False)
    ids = torch.arange(61, 70)
    wanted, got = full.get_input_embeddings()(ids).detach(), model.get_input_embeddings()(ids)
    assert 0 < float((wanted - got).abs().max()) <= 0.51 * float(wanted.abs().max()) / 127


def test_a_loaded_base_and_an_untied_head(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4
    )
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model, rows = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int8Config()), 61
    before = model(IDS).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.resize_token_embeddings(rows + 5)
    assert isinstance(model.lm_head, Int8Linear) and model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.allclose(adapted(IDS).logits[..., :rows], before, atol=1e-6)
    assert adapted(torch.tensor([[rows + 4]])).logits.shape == (1, 1, rows + 5)


def test_a_copy_resizes_itself() -> None:
    model, _ = rounded("llama")
    copied = copy.deepcopy(model)
    copied.resize_token_embeddings(70)
    assert len(copied.model.embed_tokens.weight) == 70 and len(model.model.embed_tokens.weight) == 61


def test_what_cannot_be_resized_is_said_and_left_as_it_was() -> None:
    model, asked = rounded("llama")
    before = model(**asked).logits
    with pytest.raises(ValueError, match="multiple"):
        model.resize_token_embeddings(70, pad_to_multiple_of="two")
    assert torch.equal(model(**asked).logits, before) and isinstance(model.lm_head, Int8Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.model.embed_tokens._hf_hook = object()
    with pytest.raises(BaseModelError, match="device map"):
        model.resize_token_embeddings(70)
    plain = make("llama").requires_grad_(False)
    quantize_(plain, embeddings=False)
    assert "resize_token_embeddings" not in plain.__dict__
