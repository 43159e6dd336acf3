"""Int8Config: a base is rounded while transformers reads it, written, opened again, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from helpers.tiny_architectures import SIZES, build
from helpers.tiny_tasks import save_tiny
from lorakeet import Int8Config, LoraConfig, PeftModel, get_peft_model, load_base
from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.cli import main
from lorakeet.errors import BaseModelError, ConfigError
from lorakeet.kernels.int8.format import dequantize, rounding_steps, scale_size
from lorakeet.quant.int8 import (
    Int8Embedding,
    Int8Linear,
    quantize_dense,
)
from lorakeet.quant.protocol import dequantized_copy, quantized_layers, weight_rows
from lorakeet.quant.quantize import quantize_
from lorakeet.quant.state_dict import has_weight, read_weight, write_weight

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 2, 5, 9, 9, 4]])


def logits(model: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model.eval()(input_ids=IDS, **extra)
    return out.logits if hasattr(out, "logits") else out[0]


def auto_class(kind: str) -> Any:
    config = build(tf.AutoModel, kind).config
    for auto in (tf.AutoModelForCausalLM, tf.AutoModelForSeq2SeqLM, tf.AutoModelForMaskedLM):
        if type(config) in auto._model_mapping and not (auto is tf.AutoModelForCausalLM and config.is_encoder_decoder):
            return auto
    return tf.AutoModel


@pytest.mark.parametrize("kind", SIZES)
def test_read_written_and_read_again(kind: str, tmp_path: Path) -> None:
    """For every architecture: rounded while read = rounded in memory = written and opened; near the full base."""
    auto = auto_class(kind)
    full = build(auto, kind).eval()
    full.save_pretrained(tmp_path / "full")
    read = auto.from_pretrained(tmp_path / "full", quantization_config=Int8Config())
    in_memory = auto.from_pretrained(tmp_path / "full").requires_grad_(False)
    quantize_(in_memory)
    read.save_pretrained(tmp_path / "int8")
    again = auto.from_pretrained(tmp_path / "int8")
    layers = dict(quantized_layers(read))
    assert layers and list(layers) == list(dict(quantized_layers(in_memory))) == list(dict(quantized_layers(again)))
    for other in (in_memory, again):
        for name, layer in quantized_layers(other):
            assert torch.equal(layer.weight, layers[name].weight) and torch.equal(layer.scale, layers[name].scale), name
            assert layer.weight.dtype == torch.int8 and layer.scale.dtype == torch.float32
        assert torch.equal(logits(other), logits(read))
    for name, layer in layers.items():
        dense = full.get_submodule(name).weight.detach()
        dense = dense.T if layer.transposed else dense
        step = rounding_steps(layer.weight, layer.scale)
        assert bool(((dequantize(layer.weight, layer.scale) - dense).abs() <= 0.501 * step).all()), name
    answer, truth = logits(read), logits(dequantized_copy(read))
    assert float((answer - truth).abs().max()) < 1e-5 * float(truth.abs().max())
    assert float((answer - logits(full)).norm() / answer.norm()) > 1e-5
    kinds = (torch.nn.Embedding, torch.nn.Linear, Conv1D, Int8Linear)
    shared, same = ({id(m.weight) for m in model.modules() if isinstance(m, kinds)} for model in (full, again))
    assert len(shared) == len(same)  # what was tied is tied


def test_an_embedding_that_scales_is_left_alone() -> None:
    model = build(tf.AutoModelForCausalLM, "gemma2").requires_grad_(False)
    quantize_(model)
    assert type(model.get_input_embeddings()) is not Int8Embedding
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_an_embedding_takes_no_scales_of_columns() -> None:
    weight, scale = quantize_dense(torch.randn(9, 16))
    with pytest.raises(ValueError, match="45 scales for an embedding of 9 tokens"):
        Int8Embedding(weight, scale)


def test_tied_means_one_weight_and_one_scale(tmp_path: Path) -> None:
    build(tf.AutoModelForCausalLM, "llama", tie_word_embeddings=True).save_pretrained(tmp_path / "full")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=Int8Config())
    embedding = model.get_input_embeddings()
    assert model.lm_head.weight is embedding.weight and model.lm_head.scale is embedding.scale
    model.save_pretrained(tmp_path / "int8")
    files = load_file(tmp_path / "int8" / "model.safetensors")
    assert files["model.embed_tokens.weight"].dtype == torch.int8 and "lm_head.weight" not in files
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert again.lm_head.scale is again.get_input_embeddings().scale
    apart = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=Int8Config(embeddings=False))
    assert type(apart.lm_head) is torch.nn.Linear and type(apart.get_input_embeddings()) is torch.nn.Embedding


def test_settings_travel_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    build(tf.AutoModelForCausalLM, "llama").save_pretrained(tmp_path / "full")
    config = Int8Config(embeddings=False, modules_to_not_convert=["layers.0.mlp"])
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config)
    model.save_pretrained(tmp_path / "int8")
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"] == config.to_dict()
    for found in (model, tf.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")):
        names = set(dict(quantized_layers(found)))
        assert "model.layers.1.mlp.up_proj" in names and not any("layers.0.mlp" in name for name in names)
    with pytest.raises(ConfigError, match="embedings"):
        Int8Config(embedings=True)


def test_our_loader_takes_peoples_word_for_it(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    a, b = load_base(str(folder), load_in_8bit=True), load_base(str(folder), bits=8)
    assert torch.equal(logits(a.model), logits(b.model)) and "in 8 bits" in a.describe()


# -- what the files lack or have otherwise ----------------------------------------------------------------------------


def test_what_the_files_lack_stays_plain_and_learns(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")  # written by a masked language model: no pooler
    load_base(str(folder), bits=8, auto_class=AUTO_CLASSES["MASKED_LM"]).model.save_pretrained(tmp_path / "int8")
    shutil.copy(folder / "tokenizer.json", tmp_path / "int8")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "int8")
    for place, bits in ((folder, 8), (tmp_path / "int8", None)):
        options = {"num_labels": 3}
        base = load_base(str(place), bits=bits, auto_class=AUTO_CLASSES["SEQ_CLS"], model_options=options)
        pooler = base.model.bert.pooler.dense
        assert type(pooler) is torch.nn.Linear and 0.1 < float(pooler.weight.std()) < 0.3  # as the config begins one
        assert isinstance(base.model.bert.encoder.layer[0].attention.self.query, Int8Linear)
        assert set(base.fresh) == {
            f"{name}.{part}" for name in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")
        }


def altered(folder: Path, to: Path, change: dict[str, torch.Tensor | None]) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    name = "model.layers.1.mlp.up_proj"
    nan = torch.full((64, 32), float("nan"))
    cases = {
        "other shape": ({f"{name}.weight": torch.ones(64, 31)}, name),
        "norm": ({"model.norm.weight": torch.ones(31)}, "model.norm"),
        "nan": ({f"{name}.weight": nan}, "NaN or infinite values: " + name),
        "missing": ({f"{name}.weight": None}, name),
    }
    for case, (change, match) in cases.items():
        with pytest.raises(BaseModelError, match=match):
            load_base(str(altered(folder, tmp_path / case, change)), bits=8)
    load_base(str(folder), bits=8).model.save_pretrained(tmp_path / "int8")
    for file in folder.glob("token*"):
        shutil.copy(file, tmp_path / "int8")
    written = {
        "scale gone": ({f"{name}.scale": None}, name),
        "weight gone": ({f"{name}.weight": None}, name),
        "odd": ({f"{name}.weight": torch.ones(64, 31, dtype=torch.int8)}, name),
        "stray": ({"model.layers.7.mlp.up_proj.scale": torch.ones(64)}, "layers.7"),
    }
    for case, (change, match) in written.items():
        with pytest.raises(BaseModelError, match=match):
            load_base(str(altered(tmp_path / "int8", tmp_path / case, change)))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    load_base(str(folder), bits=8).model.save_pretrained(tmp_path / "int8")
    for file in folder.glob("token*"):
        shutil.copy(file, tmp_path / "int8")
    assert torch.equal(
        logits(load_base(str(tmp_path / "int8"), bits=8).model), logits(load_base(str(folder), bits=8).model)
    )
    with pytest.raises(BaseModelError, match="stored quantized, in 8 bits"):
        load_base(str(tmp_path / "int8"), bits=32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(BaseModelError, match=r"quantized already \(gptq\)"):
        load_base(str(folder), bits=8)


def test_parts_on_disk(tmp_path: Path) -> None:
    """As device_map="auto" leaves them where memory is short: brought in for each use, in their own number formats."""
    folder = save_tiny(tmp_path / "base", "llama")
    place = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    place |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(Exception, match="lorakeet quantize"):
        tf.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=Int8Config(), device_map=place, offload_folder=tmp_path / "off"
        )
    whole = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config())
    whole.save_pretrained(tmp_path / "int8")
    split = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "int8", device_map=place, offload_folder=str(tmp_path / "off")
    )
    assert split.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(split), logits(whole))
    seen: list[torch.dtype] = []
    split.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda m, _: seen.append(m.weight.dtype))
    auto = tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8Config(), device_map="auto")
    assert torch.equal(logits(auto), logits(whole))


# -- adapters on rounded layers ---------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "head and embedding trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "pairs on head and embedding": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]},
    "a block trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", SETTINGS)
def test_adapters_of_the_vocabulary(case: str, tied: bool, tmp_path: Path) -> None:
    """They start from what the rounded base answers, learn, and move to the full base and to the rounded one."""
    build(tf.AutoModelForCausalLM, "llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "full")

    def base(bits: int) -> Any:
        settings = {"quantization_config": Int8Config()} if bits == 8 else {}
        return tf.AutoModelForCausalLM.from_pretrained(tmp_path / "full", **settings)

    bare = logits(base(8))
    torch.manual_seed(0)
    model = get_peft_model(base(8), LoraConfig(r=4, task_type="CAUSAL_LM", **SETTINGS[case]))
    assert torch.allclose(logits(model), bare, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
    learned = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.is_floating_point() for tensor in tensors.values())
    again = PeftModel.from_pretrained(base(8), tmp_path / "adapter")
    assert torch.allclose(logits(again), learned, atol=1e-5)
    moved = PeftModel.from_pretrained(base(32), tmp_path / "adapter")
    assert 0 < float((logits(moved) - learned).abs().max()) < 0.05 * float(learned.abs().max())
    back = PeftModel.from_pretrained(base(32), tmp_path / "adapter")
    back.save_pretrained(tmp_path / "back")
    assert torch.allclose(logits(PeftModel.from_pretrained(base(8), tmp_path / "back")), learned, atol=1e-5)


def test_rows_of_a_rounded_weight(tmp_path: Path) -> None:
    build(tf.AutoModelForCausalLM, "llama").save_pretrained(tmp_path)
    embedding = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Int8Config()
    ).get_input_embeddings()
    ids = torch.tensor([3, 60, 3])
    assert torch.equal(weight_rows(embedding, ids), embedding(ids))
    assert torch.equal(embedding(ids[:0]), torch.empty(0, embedding.embedding_dim))


@pytest.mark.parametrize("vocabulary", [False, True])
def test_rows_of_a_rounded_layer(vocabulary: bool) -> None:
    weight, scale = quantize_dense(torch.randn(9, 16), vocabulary=vocabulary)
    picked = weight_rows(Int8Linear(weight, scale), torch.tensor([3, 0, 3]))
    assert torch.equal(picked, dequantize(weight, scale)[[3, 0, 3]])


@pytest.mark.parametrize("vocabulary", [False, True])
def test_a_state_dict_takes_another_weight_with_its_scales(vocabulary: bool) -> None:
    torch.manual_seed(0)
    dense, other = torch.randn(9, 16), 7 * torch.randn(9, 16)
    weight, scale = quantize_dense(dense, vocabulary=vocabulary)
    assert scale.shape == ((9,) if vocabulary else (scale_size(9, 16),))
    model = torch.nn.ModuleDict({"a": Int8Linear(weight, scale), "b": torch.nn.Linear(16, 9)})
    state = {"a.weight": weight, "a.scale": scale, "b.weight": dense.clone()}
    assert has_weight(model, state, "a.weight", dense) and not has_weight(model, state, "a.weight", other)
    assert has_weight(model, state, "b.weight", dense) and not has_weight(model, state, "b.weight", other)
    for name in ("a.weight", "b.weight"):
        write_weight(model, state, name, other)
        assert has_weight(model, state, name, other) and not has_weight(model, state, name, dense)
    step = rounding_steps(weight, state["a.scale"])
    assert bool(((read_weight(model, state, "a.weight") - other).abs() <= 0.51 * step).all())


def test_scales_stay_in_fp32(tmp_path: Path) -> None:
    build(tf.AutoModelForCausalLM, "llama").save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Int8Config(), dtype=torch.bfloat16)
    layers = [layer for _, layer in quantized_layers(model)]
    assert all(layer.scale.dtype == torch.float32 and layer.dtype == torch.bfloat16 for layer in layers)
    assert model(IDS).logits.dtype == torch.bfloat16
    exact = [layer.scale.clone() for layer in layers]
    for layer, scale in zip(layers, exact, strict=True):
        layer.to(torch.float16)
        assert layer.dtype == torch.float16 and torch.equal(layer.scale, scale)


# -- the command ------------------------------------------------------------------------------------------------------


def test_quantize_writes_a_base_that_keeps_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    out = tmp_path / "int8"
    assert main(["quantize", "--model", str(folder), "--out", str(out), "--dtype", "fp32", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    written, opened = load_base(str(folder), bits=8, dtype="fp32"), load_base(str(out), dtype="fp32")
    assert torch.equal(logits(opened.model), logits(written.model))
    assert opened.name == str(folder) == figures["base"] and figures["layers"] == len(
        dict(quantized_layers(opened.model))
    )
    assert figures["bytes"] == sum(p.numel() * p.element_size() for p in opened.model.parameters())
    assert figures["full_bytes"] == sum(p.numel() * 4 for p in load_base(str(folder), dtype="fp32").model.parameters())
    assert main(["quantize", "--model", str(out), "--out", str(tmp_path / "twice")]) == 2
    assert "quantized already" in capsys.readouterr().err and not (tmp_path / "twice").exists()
    assert main(["quantize", "--model", str(folder), "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
