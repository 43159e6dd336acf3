"""Exports by their consumers' rules: each applies the very update that the adapter has, or the export is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from gguf import GGUFReader
from torch import Tensor

from helpers.consumers import gguf_updates, mlx_updates, vllm_updates
from helpers.mergeable_tokenizer import byte_level_tokenizer
from helpers.tiny import make, shake
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.compatibility import GGUF_BASES, exports
from lorakeet.base.load import load_base
from lorakeet.cli import main
from lorakeet.export.gguf.architecture import ARCHITECTURES, rope_factors, tensor_layout
from lorakeet.export.gguf.files import write_model
from lorakeet.lora.layer import LoraLayer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
#: Settings of adapters whose scale or rank some consumer ignores.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3.5, r"layers\.1\.mlp\.up_proj": 1}},
    "some layers": {"layers_to_transform": [0]},
}
IDS = torch.tensor([[5, 9, 30, 41, 22, 7]])


def config(kind: str, **changes: Any) -> Any:
    values = {
        "vocab_size": len(byte_level_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    return tf.AutoConfig.for_model(kind, **{**values, **changes})


def base(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(kind, **changes)).eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide errors
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def adapted(model: Any, **settings: Any) -> PeftModel:
    values = {"r": 4, "lora_alpha": 7, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings}
    made = get_peft_model(model, LoraConfig(**values))
    shake(made)
    return made.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tied Llama, an untied one, and an adapter of each kind of settings."""
    root = tmp_path_factory.mktemp("export")
    for name, tied in (("tied", True), ("untied", False)):
        base("llama", tie_word_embeddings=tied).save_pretrained(root / name)
        byte_level_tokenizer().save_pretrained(root / name)
    for name, settings in SETTINGS.items():
        adapted(loaded(root / "tied"), **settings).save_pretrained(root / name)
    return root


def loaded(path: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def deltas(base_path: Path, adapter: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(loaded(base_path), adapter)
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return {name: layer.delta("default").detach() for name, layer in layers}


def export(adapter: Path, consumer: str, out: Path, model: Path, *words: str) -> int:
    return main(["export", str(adapter), "--for", consumer, "--out", str(out), "--model", str(model), *words])


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(
            found[name], delta, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_each_consumer_applies_the_update_of_the_adapter(folder: Path, tmp_path: Path, name: str) -> None:
    wanted = deltas(folder / "tied", folder / name)
    for consumer in ("peft", "vllm", "mlx", "gguf"):
        assert export(folder / name, consumer, tmp_path / consumer, folder / "tied") == 0
    assert_same(vllm_updates(tmp_path / "vllm"), wanted)
    modules = [key for key, _ in loaded(folder / "tied").named_modules()]
    assert_same(mlx_updates(tmp_path / "mlx", modules), wanted)
    layout = tensor_layout(config("llama"))
    in_gguf = {layout.name(f"{key}.weight"): layout.rows(f"{key}.weight", delta) for key, delta in wanted.items()}
    assert_same(gguf_updates(tmp_path / "gguf/adapter.gguf"), in_gguf)
    for own in ("peft", "vllm"):  # both are adapters of this package too, with the base's fingerprint
        assert_same(deltas(folder / "tied", tmp_path / own), wanted)


def test_ends_of_an_untied_model(folder: Path, tmp_path: Path) -> None:
    adapted(loaded(folder / "untied"), target_modules=["embed_tokens", "lm_head"]).save_pretrained(tmp_path / "ends")
    wanted = deltas(folder / "untied", tmp_path / "ends")
    for consumer in ("vllm", "mlx", "gguf"):
        assert export(tmp_path / "ends", consumer, tmp_path / consumer, folder / "untied") == 0
    embedding, head = wanted["model.embed_tokens"], wanted["lm_head"]
    assert_same(vllm_updates(tmp_path / "vllm"), {"lm_head": head, "model.embed_tokens": embedding.T})
    mlx = mlx_updates(tmp_path / "mlx", ["model.embed_tokens", "lm_head"])
    assert_same(mlx, {"lm_head": head, "model.embed_tokens": embedding.T})
    assert_same(gguf_updates(tmp_path / "gguf/adapter.gguf"), {"output.weight": head, "token_embd.weight": embedding})


#: Settings of bases in GGUF, one of each architecture and more of what they may have.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # what transformers assumes of a GGUF file
    "gemma2": ("gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256}),
}


@pytest.mark.parametrize("name", BASES)
def test_a_model_in_gguf_is_the_same_model(tmp_path: Path, name: str) -> None:
    kind, changes = BASES[name]
    model, tokenizer = base(kind, **changes), byte_level_tokenizer()
    write_model(tmp_path / "model.gguf", model, tokenizer, "Tiny", "f32", "gpt-2")
    again = load_base(str(tmp_path / "model.gguf"), dtype="fp32", device="cpu")
    assert again.name == "Tiny"
    torch.testing.assert_close(again.model(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)
    for text in (
        ("the inn", " 12  the\n", "naïve 🙂") if kind != "gemma2" else ()
    ):  # there transformers expects SentencePiece
        assert again.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert (again.tokenizer.bos_token, again.tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


#: Format -> largest difference of logits that its rounding makes, of some 0.5.
FORMATS = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}


@pytest.mark.parametrize("form", FORMATS)
def test_a_merged_model_in_gguf(folder: Path, tmp_path: Path, form: str) -> None:
    assert export(folder / "patterns", "merged-gguf", tmp_path / "out", folder / "tied", "--format", form) == 0
    again = load_base(str(tmp_path / "out/model.gguf"), dtype="fp32", device="cpu")
    wanted = PeftModel.from_pretrained(loaded(folder / "tied"), folder / "patterns")(IDS).logits
    difference = float((again.model(IDS).logits - wanted).abs().max())
    assert difference < FORMATS[form] * float(wanted.abs().max()) * 10
    assert form == "f32" or difference > 0
    kinds = {t.tensor_type.name for t in GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert kinds == {"F32", form.upper()}


def test_a_merged_model_of_transformers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(folder / "rslora", "merged", tmp_path / "out", folder / "tied", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["for"] == "merged" and figures["lost"] < 1e-5
    wanted = PeftModel.from_pretrained(loaded(folder / "tied"), folder / "rslora")(IDS).logits
    torch.testing.assert_close(loaded(tmp_path / "out")(IDS).logits, wanted, rtol=0, atol=1e-5)


def test_a_faint_update_is_not_lost_in_blocks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "base.gguf", loaded(folder / "tied"), byte_level_tokenizer(), "Tiny", "q8_0", "gpt-2")
    model = adapted(
        load_base(str(tmp_path / "base.gguf"), dtype="fp32", device="cpu").model
    )  # on the grid of the format
    with torch.no_grad():
        for layer in model.lora_layers():
            layer.lora_B["default"].weight.mul_(1e-5)
    model.save_pretrained(tmp_path / "faint")
    words = (tmp_path / "faint", "merged-gguf", tmp_path / "out", tmp_path / "base.gguf", "--format", "q8_0")
    assert export(*words) == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert "q8_0 is too coarse for this adapter" in error and "--format f16" in error
    assert export(*words, "--accept-loss") == 0


#: Settings of an adapter, its base, the consumers that cannot read it, and words of the message.
REFUSED: list[tuple[dict[str, Any], str, list[str], str]] = [
    ({"lora_bias": True}, "untied", ["vllm", "gguf", "mlx"], "lora_B.bias"),
    ({"modules_to_save": ["lm_head"]}, "untied", ["vllm", "gguf", "mlx"], "lm_head.weight"),
    ({"trainable_token_indices": [3]}, "untied", ["vllm", "gguf", "mlx"], "trainable_tokens_delta"),
    ({"target_modules": ["embed_tokens"]}, "tied", ["gguf", "mlx"], "tied to the other end"),
    ({"target_modules": ["lm_head"]}, "tied", ["gguf", "mlx"], "tied to the other end"),
]


@pytest.mark.parametrize(("settings", "name", "consumers", "words"), REFUSED)
def test_what_a_consumer_cannot_read_is_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    name: str,
    consumers: list[str],
    words: str,
) -> None:
    adapted(loaded(folder / name), **settings).save_pretrained(tmp_path / "adapter")
    for consumer in consumers:
        assert export(tmp_path / "adapter", consumer, tmp_path / "out", folder / name) == 2
        assert words in (error := capsys.readouterr().err) and "--for merged" in error
    assert export(tmp_path / "adapter", "peft", tmp_path / "out", folder / name) == 0


@pytest.mark.parametrize("consumer", ["gguf", "mlx", "merged-gguf"])
def test_another_architecture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], consumer: str) -> None:
    model = make("gpt2")
    model.save_pretrained(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    adapted(model, target_modules=["c_attn"]).save_pretrained(tmp_path / "adapter")
    assert export(tmp_path / "adapter", consumer, tmp_path / "out", tmp_path / "base") == 2
    assert "the base is one of gpt2, expected one of" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_inspect_tells_the_exports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{folder}/rslora"]) == 0
    assert "  gguf        yes (the scale is multiplied into B)" in capsys.readouterr().out
    found = exports(LoraConfig(target_modules=["q_proj"]), [], [600], base="bloom")
    assert {name for name, answer in found.items() if not answer["can"]} == {"vllm", "gguf", "mlx", "merged-gguf"}
    assert set(GGUF_BASES) == set(ARCHITECTURES)


def test_frequencies_of_a_long_llama_are_those_of_transformers() -> None:
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    settings = config("llama", head_dim=64, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaled})
    wanted, _ = tf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](settings, "cpu")
    plain = 5e5 ** -(torch.arange(0, 64, 2) / 64)
    factors = rope_factors(settings)
    torch.testing.assert_close(plain / factors, wanted, rtol=1e-5, atol=0)
    assert factors.min() == 1 and factors.max() == 8 and rope_factors(config("llama")) is None


#: Adapters that are no sum W + s·B·A on the base's whole weight, and the share of the update that plain LoRA may lose.
OTHERS: dict[str, tuple[dict[str, Any], float]] = {
    "pissa": ({"init_lora_weights": "pissa"}, 1e-4),
    "adalora": ({"adalora_config": {"init_r": 6, "target_r": 3}, "r": 6}, 0.0),
    "vera": ({"vera_config": {}, "lora_alpha": 8, "r": 6}, 1e-3),
    "dora": ({"use_dora": True, "target_modules": ["q_proj", "down_proj"]}, 1.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_variants_become_plain_lora(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    settings, most = OTHERS[name]
    model = adapted(loaded(folder / "tied"), **settings)
    model.save_pretrained(tmp_path / "adapter")
    wanted = PeftModel.from_pretrained(loaded(folder / "tied"), tmp_path / "adapter").merge_and_unload().state_dict()
    before = loaded(folder / "tied").state_dict()
    losses = []
    for rank in ([], ["--rank", "32"]):
        words = ("vllm", tmp_path / "out", folder / "tied", *rank, "--accept-loss", "--overwrite", "--json")
        assert export(tmp_path / "adapter", *words) == 0
        losses.append(json.loads(capsys.readouterr().out)["lost"])
        for layer, update in vllm_updates(tmp_path / "out").items():
            change = wanted[f"{layer}.weight"] - before[f"{layer}.weight"]
            assert float((update - change).norm()) <= (losses[-1] + 1e-4) * float(change.norm())
    assert losses[0] <= most and losses[1] < 1e-4  # of rank 32 it is the whole update


def test_a_large_loss_stops_the_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(loaded(folder / "tied"), use_dora=True, target_modules=["down_proj"])
    with torch.no_grad():  # only the magnitudes move: a change of full rank
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + torch.rand(parameter.shape)
            elif ".lora_B." in name:
                parameter *= 1e-3
    model.save_pretrained(tmp_path / "adapter")
    assert export(tmp_path / "adapter", "gguf", tmp_path / "out", folder / "tied") == 2
    assert "--accept-loss" in capsys.readouterr().err and not (tmp_path / "out").exists()
