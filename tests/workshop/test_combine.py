"""Adapters combined by their files: equal to the combination in memory, and read by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import make, shake, token_ids
from helpers.tiny_experts import IDS, adapted, moe
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.api import combine_adapters
from lorakeet.cli import main
from lorakeet.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 4, "use_rslora": True, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        model = get_peft_model(make("llama"), LoraConfig(**settings, rank_pattern={r"layers\.1\.self_attn\.q_proj": 2}))
        shake(model, seed=seed)
        model.save_pretrained(tmp_path / name)
    return tmp_path


def both(folder: Path) -> list[Path]:
    return [folder / "a", folder / "b"]


@pytest.mark.parametrize(("how", "density"), [("linear", None), ("svd", None), ("ties", 0.4), ("ties_svd", 0.4)])
def test_files_are_combined_as_in_memory(how: str, density: float | None, folder: Path) -> None:
    made = combine_adapters(both(folder), folder / "made", [0.5, -1.0], how, density=density)
    model = PeftModel.from_pretrained(make("llama"), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "sum", how, density=density)
    model.set_adapter("sum")
    theirs = peft.PeftModel.from_pretrained(make("llama"), folder / "made")
    torch.testing.assert_close(theirs(token_ids()).logits, model(token_ids()).logits, rtol=1e-5, atol=1e-5)
    assert made["ranks"]["model.layers.0.self_attn.q_proj"] == (4 if how.endswith("svd") else 7)
    assert (made["energy_kept"] == pytest.approx(1)) == (how == "linear")
    notes = json.loads((folder / "made" / "lorakeet.json").read_text())
    assert notes["combined"]["method"] == how and str(folder) not in json.dumps(notes)


def test_stacked_experts(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        model = adapted()
        shake(model, seed=seed)
        model.save_pretrained(tmp_path / name)
    combine_adapters(both(tmp_path), tmp_path / "made", [1.0, 1.0])
    model = PeftModel.from_pretrained(moe(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    model.set_adapter(["a", "b"])
    made = PeftModel.from_pretrained(moe(), tmp_path / "made")
    torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_dare_is_repeated_by_its_seed(folder: Path) -> None:
    files = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        combine_adapters(both(folder), folder / name, how="dare_linear", density=0.5, seed=seed)
        files.append((folder / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_half_precision_is_added_up_in_fp32(folder: Path) -> None:
    path = folder / "a" / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    combine_adapters([folder / "a"], folder / "made", [1.0])
    made = load_file(folder / "made" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}


def test_what_cannot_be_combined(folder: Path) -> None:
    other = get_peft_model(make("llama", 5), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    shake(other)
    other.save_pretrained(folder / "c")
    with pytest.raises(AdapterError, match=r"trained on different bases: weights differ"):
        combine_adapters([folder / "a", folder / "c"], folder / "made")
    with pytest.raises(AdapterError, match="has modules_to_save, which cannot be combined"):
        combine_adapters([folder / "a", folder / "c"], folder / "made", allow_other_base=True)
    path = folder / "b" / "adapter_model.safetensors"
    extra = {"base_model.model.model.norm.weight": torch.ones(32)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="its own model.norm.weight"):
        combine_adapters(both(folder), folder / "made")
    assert not (folder / "made").exists()


def test_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["combine", "a", "b", "--weights", "0.5", "0.25", "--out", "one"]) == 0
    assert "one: linear of 2 adapters in 9 layers, rank 3 to 7" in capsys.readouterr().out
    assert (
        main(["combine", "a", "b", "--weights", "1,-1", "--how", "svd", "--rank", "2", "--out", "two", "--json"]) == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["weights"] == [1, -1] and set(figures["ranks"].values()) == {2} and figures["energy_kept"] < 1
    for words, message in [
        (["a", "b", "--how", "ties", "--out", "x"], "density None"),
        (["a", "b", "--weights", "1", "--out", "x"], "1 numbers for 2 adapters"),
        (["a", "b", "--weights", "1,x", "--out", "x"], "'x'"),
        (["a", "b", "--out", "one"], "is not empty"),
        (["a", "a", "--out", "x"], "named twice"),
    ]:
        assert main(["combine", *words]) == 2
        assert message in capsys.readouterr().err and not (folder / "x").exists()
