"""Merged and quantized models on disk: the number formats of their base on every processor, and its generation config."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from helpers.tiny import shake
from helpers.tiny_tasks import save_tiny
from lorakeet import LoraConfig, PeftModel, api, get_peft_model
from lorakeet.base.storage import stored_formats, widest_format
from lorakeet.cli import main
from lorakeet.config import BaseSettings
from lorakeet.errors import BaseModelError, MergeError

IDS = torch.randint(5, 14, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base in fp32, bf16 and both (its head and norms in fp32), with a strong and a faint adapter."""
    root = tmp_path_factory.mktemp("bases")
    save_tiny(root / "fp32", "llama")
    shutil.copytree(root / "fp32", root / "bf16")
    shutil.copytree(root / "fp32", root / "mixed")
    tensors = load_file(root / "fp32/model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    mixed = {name: tensors[name] if "norm" in name else half for name, half in halves.items()}
    save_file(halves, root / "bf16/model.safetensors", metadata={"format": "pt"})
    save_file(mixed, root / "mixed/model.safetensors", metadata={"format": "pt"})
    for name, factor in (("strong", 1.0), ("faint", 1e-5)):
        model = tf.AutoModelForCausalLM.from_pretrained(root / "bf16", dtype=torch.float32)
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**settings))
        shake(model)
        with torch.no_grad():
            for layer in model.lora_layers():
                layer.lora_B["default"].weight.mul_(factor)
        model.save_pretrained(root / name)
    return root


#: Features for bf16, as ``LORAKEET_CPU_FEATURES`` names them: without and with AVX512_BF16.
PROCESSORS = {"plain": "-bf16", "avx512_bf16": "+bf16"}


def pretend(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", PROCESSORS[processor])


def formats(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("base", ["fp32", "bf16", "mixed"])
def test_a_merged_model_has_the_formats_of_its_base_on_every_processor(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, processor: str
) -> None:
    pretend(monkeypatch, processor)
    figures = api.merge(
        BaseSettings(model=str(bases / base)), str(bases / "strong"), tmp_path / "out", allow_other_base=True
    )
    assert formats(tmp_path / "out") == formats(bases / base)
    assert figures["error"] < (1e-4 if base == "fp32" else 0.02 * figures["effect"]) and figures["effect"] > 1
    model = tf.AutoModelForCausalLM.from_pretrained(bases / base, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(model, bases / "strong", allow_other_base=True)(IDS).logits
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-4 if base == "fp32" else 0.1)


def test_two_processors_write_the_same_bytes(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = set()
    for processor in PROCESSORS:
        pretend(monkeypatch, processor)
        out = tmp_path / processor
        assert main(["merge", "--model", f"{bases}/bf16", "--adapter", f"{bases}/strong", "--out", str(out)]) == 0
        written.add((out / "model.safetensors").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize(("base", "asked"), [("fp32", "bf16"), ("bf16", "fp32"), ("mixed", "fp16")])
def test_another_format_is_stored_where_it_is_asked_for_and_said(
    bases: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    base: str,
    asked: str,
) -> None:
    caplog.set_level("INFO", "lorakeet")
    words = ["--adapter", f"{bases}/strong", "--out", str(tmp_path / "out"), "--dtype", asked, "--json"]
    assert main(["merge", "--model", f"{bases}/{base}", *words, "--allow-other-base"]) == 0
    out = capsys.readouterr().out
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[asked]
    assert set(formats(tmp_path / "out").values()) == {dtype} and json.loads(out)["dtype"] == asked
    assert f"stored in {asked}, as --dtype says (the base has" in caplog.text


@pytest.mark.parametrize(("base", "dtype"), [("bf16", "auto"), ("fp32", "bf16")])
def test_an_update_that_the_format_would_lose_is_refused_unless_accepted(
    bases: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    base: str,
    dtype: str,
) -> None:
    words = ["merge", "--model", f"{bases}/{base}", "--adapter", f"{bases}/faint", "--out", str(tmp_path / "out")]
    words += ["--allow-other-base", "--dtype", dtype]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "bfloat16 is too coarse for this adapter" in err and "--dtype fp32" in err and "--accept-loss" in err
    assert not list(tmp_path.iterdir())
    assert main([*words, "--accept-loss"]) == 0
    assert "bfloat16 is too coarse" in caplog.text
    caplog.clear()
    assert main([*words, "--overwrite", "--dtype", "fp32"]) == 0  # the hint's advice
    assert "too coarse" not in caplog.text


def test_a_module_trained_whole_is_measured_too(bases: Path, tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(bases / "bf16", dtype=torch.float32)
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**settings))
    shake(model)
    with torch.no_grad():
        head = model.lm_head
        head.modules_to_save["default"].weight.copy_(head.original_module.weight * 1.0005)  # less than a step of bf16
        for layer in model.lora_layers():
            layer.lora_B["default"].weight.mul_(0.02)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"in lm_head"):
        api.merge(BaseSettings(model=str(bases / "bf16")), str(tmp_path / "adapter"), tmp_path / "out")


def test_an_8_bit_base_is_no_place_to_merge(bases: Path, tmp_path: Path) -> None:
    api.quantize(BaseSettings(model=str(bases / "fp32")), tmp_path / "small")
    settings = BaseSettings(model=str(tmp_path / "small"))
    with pytest.raises(MergeError, match="int8"):
        api.merge(settings, str(bases / "strong"), tmp_path / "out", allow_other_base=True)
    figures = api.merge(settings, str(bases / "strong"), tmp_path / "out", allow_other_base=True, accept_loss=True)
    assert figures["lost"] > 0 and torch.int8 in formats(tmp_path / "out").values()


@pytest.mark.parametrize("base", ["fp32", "bf16", "mixed"])
def test_a_quantized_base_keeps_the_formats_of_what_stays(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    pretend(monkeypatch, "avx512_bf16")
    api.quantize(BaseSettings(model=str(bases / base)), tmp_path / "small")
    own, made = formats(bases / base), formats(tmp_path / "small")
    kept = {name: dtype for name, dtype in made.items() if "norm" in name}
    assert kept == {name: own[name] for name in kept} and kept
    assert torch.int8 in made.values()


#: Generation configs of public models, each of which transformers reads and refuses to save.
GENERATION = [{"temperature": 0.6, "top_p": 0.9}, {"top_k": 3}, {"num_beams": 1, "length_penalty": 2.0}]


@pytest.mark.parametrize("values", GENERATION, ids=str)
def test_a_generation_config_is_written_as_it_was_given(bases: Path, tmp_path: Path, values: dict[str, float]) -> None:
    base = shutil.copytree(bases / "fp32", tmp_path / "base")
    given = json.dumps({**values, "eos_token_id": 1, "transformers_version": "4.40.0"})
    (base / "generation_config.json").write_text(given)
    api.merge(BaseSettings(model=str(base)), str(bases / "strong"), tmp_path / "merged", allow_other_base=True)
    api.quantize(BaseSettings(model=str(base)), tmp_path / "small")
    for out in ("merged", "small"):
        assert (tmp_path / out / "generation_config.json").read_text() == given
        assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / out).generation_config.eos_token_id == 1


def test_generation_settings_in_the_models_config_do_not_stop_the_merge(bases: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bases / "fp32", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "temperature": 0.6, "max_length": 40}))
    (base / "generation_config.json").unlink(missing_ok=True)
    api.merge(BaseSettings(model=str(base)), str(bases / "strong"), tmp_path / "merged", allow_other_base=True)
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits.isfinite().all()


def test_a_broken_generation_config_is_told_before_the_work(bases: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bases / "fp32", tmp_path / "base")
    for text in ("{", "[1]"):
        (base / "generation_config.json").write_text(text)
        with pytest.raises(BaseModelError, match=r"generation_config\.json"):
            api.merge(BaseSettings(model=str(base)), str(bases / "strong"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_formats_are_read_under_the_names_of_the_model(bases: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(bases / "mixed")
    found = stored_formats(bases / "mixed", model)
    assert found.of("model.norm.weight") == torch.float32 == widest_format(bases / "mixed")
    assert found.of("model.layers.0.mlp.up_proj.weight") == torch.bfloat16
    assert found.describe() == "bf16 and fp32"
