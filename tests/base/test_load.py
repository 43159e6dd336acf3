"""A loaded base is frozen, complete, and in the requested number format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from helpers.bytewise import byte_tokenizer
from lorakeet.base.device_dtype import bytes_by_dtype, check_dtypes, choose_device, choose_dtype
from lorakeet.base.load import Base, load_base
from lorakeet.config import QUANTIZED_FORMATS, BaseSettings
from lorakeet.errors import BaseModelError, ConfigError
from lorakeet.quant.hf_quantizer import CONFIGS, Int8Config
from lorakeet.quant.protocol import has_rounded

CPU = torch.device("cpu")
IDS = torch.arange(2, 40).reshape(2, 19)


def test_frozen_and_equal_to_plain_transformers(base: Base, folder: Path) -> None:
    model, tokenizer = base
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert tokenizer("hi").input_ids == [base.tokenizer.convert_tokens_to_ids(c) for c in "hi"]


def test_settings_and_single_settings(folder: Path) -> None:
    settings = BaseSettings(model=str(folder), dtype="fp32", device="cpu")
    assert load_base(settings).dtype == torch.float32
    assert load_base(settings, dtype="bf16").model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        load_base(settings, dtyp="bf16")


def test_the_end_token_pads_where_there_is_no_other(base: Base) -> None:
    assert base.tokenizer.pad_token == base.tokenizer.eos_token == "</s>"
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id


def test_the_name_is_what_was_asked_for(base: Base, folder: Path) -> None:
    assert base.name == base.model.name_or_path == base.tokenizer.name_or_path == str(folder)


def test_describe_counts_parameters_and_bytes(save_model: Callable[..., Path]) -> None:
    base = load_base(str(save_model()), dtype="bf16", device="cpu")
    parameters = sum(p.numel() for p in base.model.parameters())
    sizes = bytes_by_dtype(base.model)
    assert sizes[torch.bfloat16] == 2 * parameters
    assert f"{parameters:,} parameters, bf16 on cpu" in base.describe()
    assert "\n" not in base.describe()


def test_tied_weights_count_once(base: Base) -> None:
    linear, tied = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(4, 6, bias=False)
    tied.weight = linear.weight
    assert bytes_by_dtype(torch.nn.Sequential(linear, tied)) == {torch.float32: 96}


def test_a_tensor_of_another_format_is_found(base: Base) -> None:
    base.model.model.layers[1].mlp.up_proj.half()
    with pytest.raises(BaseModelError, match=r"not loaded in fp32: model\.layers\.1\.mlp\.up_proj\.weight is fp16"):
        check_dtypes(base.model, torch.float32, "tiny")


def test_the_format_is_checked_after_loading(folder: Path) -> None:
    with pytest.raises(BaseModelError, match="not loaded in fp32: .* is fp16"):
        load_base(str(folder), dtype="fp32", device="cpu", model_options={"dtype": torch.float16})


def test_what_the_architecture_keeps_in_fp32_may_stay(save_model: Callable[..., Path]) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 258}
    folder = save_model(model=T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)))
    base = load_base(str(folder), auto_class=AutoModelForSeq2SeqLM, dtype="fp16", device="cpu")
    assert {p.dtype for p in base.model.parameters()} == {torch.float16, torch.float32}


def test_missing_weights_are_an_error(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"1 weights are missing .*layers\.0\.self_attn\.q_proj\.weight"):
        load_base(str(folder), device="cpu")


def test_weights_of_another_shape_are_an_error(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.norm\.weight has shape \[31\], expected \[32\]"):
        load_base(str(folder), device="cpu")


def test_a_new_head_is_random_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = load_base(
        str(folder), auto_class=AutoModelForSequenceClassification, model_options={"num_labels": 5}, device="cpu"
    )
    assert base.model.score.weight.shape == (5, 32)
    assert "1 weights are not in" in caplog.text and "are initialized randomly: score.weight" in caplog.text
    assert "not used: lm_head.weight" in caplog.text


def test_bars_are_silent_and_come_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()
    logging.set_verbosity_warning()
    capsys.readouterr()
    load_base(str(folder), dtype="fp32", device="cpu")
    with pytest.raises(BaseModelError):
        load_base(str(folder / "config.json"), device="cpu")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (True, logging.WARNING)
    assert capsys.readouterr() == ("", "")


def test_tokens_without_an_embedding_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "embeddings" not in caplog.text
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    load_base(str(folder), dtype="fp32", device="cpu")
    assert "embeddings of 260 tokens, its tokenizer has more: no text may contain <pad>" in caplog.text


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(BaseModelError, match="tokenizer of"):
        load_base(str(folder), device="cpu")


def dtype_of(**settings: object) -> torch.dtype:
    return choose_dtype(BaseSettings(**settings), CPU)


@pytest.mark.parametrize("features", ["", "+bf16", "-bf16"])
@pytest.mark.parametrize("bits", [None, 32, 8, 4])
def test_auto_is_fp32_on_every_cpu(features: str, bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No processor trains faster in bf16 without compiled loops for it, and none as exactly."""
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", features)
    assert dtype_of(bits=bits) == torch.float32
    assert bits == 32 or dtype_of(bits=bits, dtype="bf16") == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"bits": 32}, torch.float32),
        ({"bits": 16}, torch.bfloat16),
        ({"dtype": "bf16"}, torch.bfloat16),
        ({"dtype": "fp16", "bits": 16}, torch.float16),
        ({"dtype": "fp32"}, torch.float32),
    ],
)
def test_dtype_by_bits_or_name(settings: dict[str, object], dtype: torch.dtype) -> None:
    assert dtype_of(**settings) == dtype


@pytest.mark.parametrize("settings", [{"bits": 32, "dtype": "bf16"}, {"bits": 16, "dtype": "fp32"}])
def test_bits_against_dtype(settings: dict[str, object]) -> None:
    with pytest.raises(BaseModelError, match="contradicts"):
        dtype_of(**settings)


def test_bf16_without_instructions_warns(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, said in ((True, False), (False, True)):
        monkeypatch.setattr("lorakeet.base.device_dtype.has_bf16", lambda device, has=has: has)
        caplog.clear()
        dtype_of(dtype="bf16")
        assert ("much slower" in caplog.text) == said


def test_fp16_on_a_cpu_does_not_train(folder: Path) -> None:
    with pytest.raises(BaseModelError, match=r"fp16 .*cannot train on a CPU") as caught:
        load_base(str(folder), device="cpu", dtype="fp16", for_training=True)
    assert caught.value.hint == "use --dtype bf16 or fp32"
    assert load_base(str(folder), device="cpu", dtype="fp16").model.dtype == torch.float16


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "nonsense", "cuda:99", "cpu:7", "meta"])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        choose_device(name)
    assert repr(name) in caught.value.message and caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_without_cuda() -> None:
    with pytest.raises(BaseModelError, match="'cuda' is not available, torch finds 1 cpu here"):
        choose_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda(folder: Path) -> None:
    base = load_base(str(folder))
    assert base.device.type == "cuda" and {p.device for p in base.model.parameters()} == {torch.device("cuda", 0)}
    assert base.dtype in (torch.bfloat16, torch.float16)
    assert base.model(IDS.cuda()).logits.isfinite().all()


def test_a_quantized_format_is_loaded_by_its_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def config() -> Int8Config:
        made.append(Int8Config())
        return made[-1]

    monkeypatch.setitem(QUANTIZED_FORMATS, 4, "fake")
    monkeypatch.setitem(CONFIGS, "fake", config)
    assert has_rounded(load_base(str(folder), bits=4, device="cpu").model) and len(made) == 1
