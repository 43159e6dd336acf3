"""Quantized formats that the package does not know, and NF4: nothing but the format's own file has to be written for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import fake_quant
from helpers.fake_quant import FakeLinear
from helpers.tiny_training import tiny_data, tiny_llama, tiny_tokenizer
from lorakeet.adapter.fingerprint import fingerprint, mismatch
from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.errors import AdapterError, MergeError
from lorakeet.inference.generate import complete
from lorakeet.lora.config import LoraConfig
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.padding_free import padding_free
from lorakeet.quant.layer_selection import layers_to_quantize
from lorakeet.quant.nf4 import NF4
from lorakeet.quant.protocol import (
    dequantized_copy,
    has_rounded,
    is_quantized,
    quantized_bytes,
    quantized_layers,
    weight_shape,
)
from lorakeet.quant.replace import replace_layers_
from lorakeet.train.trainer import Trainer

#: The formats by name.
FORMATS = {**fake_quant.FORMATS, "nf4": NF4}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 2, 5, 9, 9, 4]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def base(form: str, **changes: Any) -> Any:
    """A tiny Llama with layers, embedding and head in a format: the only place that names it."""
    model = tiny_llama(**{"initializer_range": 0.2, **changes}).eval().requires_grad_(False)
    replace_layers_(model, layers_to_quantize(model), FORMATS[form])
    return model


def adapted(form: str, seed: int = 0, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    given = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(base(form, seed=seed), LoraConfig(**given))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_every_layer_is_found_and_computes_what_its_values_say(form: str) -> None:
    model = base(form)
    assert has_rounded(model) and len(list(quantized_layers(model))) == 16
    assert weight_shape(model.model.layers[0].mlp.up_proj) == (64, 32)
    assert tuple(model.model.layers[0].mlp.up_proj.weight.shape) != (64, 32)
    assert torch.allclose(logits(model), logits(dequantized_copy(model)), atol=1e-5)
    sizes = quantized_bytes(model, torch.float32)
    assert sizes["layers"] == 16 and sizes["bytes"] < 0.6 * sizes["full_bytes"]
    full = tiny_llama(initializer_range=0.2)
    assert sizes["full_bytes"] == sum(p.nbytes for p in full.parameters())
    for name, layer in quantized_layers(model):
        dense = full.get_submodule(name).weight
        assert layer.quantized_weight().is_rounding_of(dense), name


def test_the_gradient_is_that_of_the_dense_weight(form: str) -> None:
    model = adapted(form, init_lora_weights=False)
    dense = get_peft_model(dequantized_copy(base(form)), model.peft_config["default"])
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora_" in k}, strict=False)
    grads = []
    for one in (model, dense):
        one.eval()(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert len(grads[0]) == 12 and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def trained(form: str, args: Any, collator: Any, resume: bool = False) -> Trainer:
    trainer = Trainer(adapted(form, lora_dropout=0.1), args, train_dataset=tiny_data(48), data_collator=collator)
    with padding_free(trainer.model), fused_loss(trainer.model), fused_layers(trainer.model):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_trains_and_resumes_to_the_same_adapter(
    form: str, make_args: Callable[..., Any], collator: Any, tmp_path: Path
) -> None:
    whole = trained(form, make_args(max_steps=8, output_dir=str(tmp_path / "whole")), collator)
    assert losses(whole)[-1] < losses(whole)[0]
    half = make_args(max_steps=8, output_dir=str(tmp_path / "parts"), save_strategy="steps", save_steps=4)
    trained(form, half, collator)
    for step in (tmp_path / "parts" / "checkpoint-8").iterdir():
        step.unlink()
    (tmp_path / "parts" / "checkpoint-8").rmdir()
    resumed = trained(form, half, collator, resume=True)
    assert resumed.state.global_step == 8 and losses(resumed) == losses(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_the_adapter_is_saved_and_loaded_again(form: str, tmp_path: Path) -> None:
    model = adapted(form, init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(form), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    full = PeftModel.from_pretrained(dequantized_copy(base(form)), tmp_path / "adapter")  # the same base in fp32
    assert torch.allclose(logits(full), logits(model), atol=1e-4)
    with pytest.raises(AdapterError, match="trained on"):
        PeftModel.from_pretrained(base(form, seed=1), tmp_path / "adapter")
    assert mismatch(fingerprint(base(form)), dequantized_copy(base(form))) is None


def test_an_adapted_embedding_is_saved_as_dense_values(form: str, tmp_path: Path) -> None:
    model = adapted(form, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(form), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model)) and is_quantized(again.get_input_embeddings().base_layer)


def test_rows_and_modules_that_are_trained_start_from_the_dense_values(form: str) -> None:
    model = adapted(form, trainable_token_indices={"embed_tokens": [3, 5]}, modules_to_save=["lm_head"])
    assert torch.allclose(logits(model), logits(base(form)), atol=1e-5)
    model(IDS, labels=IDS).loss.backward()
    learned = [name for name, p in model.named_parameters() if p.grad is not None]
    assert sum("trainable_tokens_delta" in name for name in learned) == 1
    assert sum("modules_to_save" in name for name in learned) == 1


def test_merging_keeps_the_format_where_it_is_fine_enough(form: str) -> None:
    model = adapted(form, init_lora_weights=False)
    before = logits(model)
    if form != "16 bits":
        with pytest.raises(MergeError, match="uint8"):
            model.merge_adapter()
        assert torch.equal(logits(model), before)
        return
    stored = {name: t.clone() for name, t in model.state_dict().items()}
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(layer, FakeLinear) and layer.weight.dtype == torch.int16
    assert float((logits(model) - before).abs().max()) <= 5e-3 * float(before.abs().max())
    assert any(not torch.equal(t, stored[name]) for name, t in model.state_dict().items())
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(t, stored[name]) for name, t in model.state_dict().items())
    merged = model.merge_and_unload()
    assert has_rounded(merged) and float((logits(merged) - before).abs().max()) <= 5e-3 * float(before.abs().max())


def test_it_writes(form: str) -> None:
    model, tokenizer = adapted(form, seed=4, init_lora_weights=False), tiny_tokenizer()
    texts = complete(model, tokenizer, ["a bird sings", "the parrot"], max_new_tokens=5, greedy=True)
    dense = get_peft_model(dequantized_copy(base(form, seed=4)), model.peft_config["default"])
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora_" in k}, strict=False)
    assert texts == complete(dense, tokenizer, ["a bird sings", "the parrot"], max_new_tokens=5, greedy=True)
    assert all(texts)
