"""Adapters from before a renaming in transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from helpers.tiny import shake
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError

X = torch.randint(1, 50, (1, 6), generator=torch.Generator().manual_seed(0))


def qwen2_vl() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 61, "num_key_value_heads": 1, "rope_scaling": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    ids = {"image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}
    config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, pad_token_id=0, **ids)
    return tf.Qwen2VLForConditionalGeneration(config).eval()


def llava() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        text_config={**sizes, "model_type": "llama", "vocab_size": 61, "num_key_value_heads": 2},
        vision_config={**sizes, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        image_token_index=60,
    )
    return tf.LlavaForConditionalGeneration(config).eval()


#: A model -> how its names of today read in the release before: text to replace, replacement.
RENAMED = {
    "qwen2_vl": (qwen2_vl, [("model.language_model.layers", "model.layers"), ("model.visual.", "visual.")]),
    "llava": (
        llava,
        [
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
            ("lm_head.", "language_model.lm_head."),
        ],
    ),
}


def older(text: str, replacements: list[tuple[str, str]]) -> str:
    for new, old in replacements:
        text = text.replace(f"base_model.model.{new}", f"base_model.model.{old}") if "base_model" in text else text
    return text


@torch.no_grad()
def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=X, attention_mask=torch.ones_like(X)).logits


def saved(kind: str, folder: Path, keep_notes: bool = False, **settings: object) -> torch.Tensor:
    """Save an adapter with the names of the release before; return the logits that it gives."""
    make, replacements = RENAMED[kind]
    model = get_peft_model(make(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **settings}))
    shake(model)
    wanted = logits(model)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({older(key, replacements): t for key, t in load_file(file).items()}, file, metadata={"format": "pt"})
    if not keep_notes:
        (folder / "lorakeet.json").unlink()
    return wanted


@pytest.mark.parametrize("kind", RENAMED)
def test_an_older_adapter_loads_and_answers_the_same(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lorakeet")
    wanted = saved(kind, tmp_path)
    model = PeftModel.from_pretrained(RENAMED[kind][0](), tmp_path)
    assert torch.equal(logits(model), wanted)
    assert "have other names in this release of transformers" in caplog.text
    model.save_pretrained(tmp_path / "again")  # and it is saved with the names of today
    again = PeftModel.from_pretrained(RENAMED[kind][0](), tmp_path / "again")
    assert torch.equal(logits(again), wanted)


def rewrite(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "targets",
    [
        r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
        [f"model.layers.{n}.self_attn.{leaf}" for n in (0, 1) for leaf in ("q_proj", "v_proj")],
    ],
    ids=["a regular expression", "full names"],
)
def test_older_names_in_the_settings_mean_the_same_layers(targets: object, tmp_path: Path) -> None:
    wanted = saved("qwen2_vl", tmp_path)
    rewrite(tmp_path, target_modules=targets)
    assert torch.equal(logits(PeftModel.from_pretrained(qwen2_vl(), tmp_path)), wanted)


def test_ranks_and_alphas_by_older_names_are_kept(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"model.language_model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"language_model.layers.1.self_attn.v_proj": 32},
    }
    wanted = saved("qwen2_vl", tmp_path, **patterns)
    rewrite(
        tmp_path,
        rank_pattern={r"model\.layers\.1\.self_attn\.q_proj": 2},
        alpha_pattern={"model.layers.1.self_attn.v_proj": 32},
    )
    assert torch.equal(logits(PeftModel.from_pretrained(qwen2_vl(), tmp_path)), wanted)


def test_the_fingerprint_of_an_older_adapter_is_compared_under_the_names_of_today(tmp_path: Path) -> None:
    wanted = saved("qwen2_vl", tmp_path, keep_notes=True)
    notes = json.loads((tmp_path / "lorakeet.json").read_text())
    mark = notes["base"]["fingerprint"]
    mark["values"] = {name.replace("model.language_model.", "model."): v for name, v in mark["values"].items()}
    mark["shapes"] = "0" * 16  # of other names
    (tmp_path / "lorakeet.json").write_text(json.dumps(notes))
    assert torch.equal(logits(PeftModel.from_pretrained(qwen2_vl(), tmp_path)), wanted)
    other = qwen2_vl()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with pytest.raises(AdapterError, match="its weights differ"):
        PeftModel.from_pretrained(other, tmp_path)


def test_an_adapter_of_today_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lorakeet")
    model = get_peft_model(qwen2_vl(), LoraConfig(r=4, target_modules=["q_proj"]))
    shake(model)
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(qwen2_vl(), tmp_path)
    assert "other names" not in caplog.text
    wrong = shutil.copytree(tmp_path, tmp_path / "wrong")
    file = wrong / "adapter_model.safetensors"
    save_file(
        {k.replace("layers.0", "layers.7"): t for k, t in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    with pytest.raises(AdapterError, match="unexpected tensors"):
        PeftModel.from_pretrained(qwen2_vl(), wrong, allow_other_base=True)
