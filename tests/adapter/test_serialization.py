"""An adapter's files: those that are refused, with one clear error each, and an unchanged model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, PeftConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError, ConfigError, LorakeetError, OutputError
from lorakeet.lora.layer import LoraLayer

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def refuse(folder, kind=AdapterError, base="llama", seed=0, **options):
    """Check that loading raises on a fresh base and beside another adapter, and changes neither."""
    fresh = make(base, seed)
    wanted = fresh(token_ids()).logits
    trains = [p.requires_grad for p in fresh.parameters()]
    with pytest.raises(kind) as caught:
        PeftModel.from_pretrained(fresh, folder, **options)
    assert not isinstance(fresh, PeftModel) and not any(isinstance(m, LoraLayer) for m in fresh.modules())
    assert torch.equal(fresh(token_ids()).logits, wanted)
    assert trains == [p.requires_grad for p in fresh.parameters()]
    assert len(caught.value.message.splitlines()) == 1
    return str(caught.value)


def test_missing_tensors(saved):
    change(saved, lambda t: (t.pop(f"{Q}.lora_A.weight"), t.pop(f"{Q}.lora_B.weight")))
    message = refuse(saved)
    assert "missing tensors (2)" in message and f"{Q}.lora_A.weight" in message and f"{Q}.lora_B.weight" in message


def test_unexpected_tensors(saved):
    change(saved, lambda t: t.update({f"{Q.replace('q_proj', 'k_proj')}.lora_A.weight": torch.ones(4, 32)}))
    assert "unexpected tensors (1)" in (message := refuse(saved)) and "k_proj" in message


def test_wrong_shapes(saved):
    change(saved, lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 31)}))
    assert f"{Q}.lora_A.weight is [4, 31], expected [4, 32]" in refuse(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(saved, value):
    change(saved, lambda t: t[f"{Q}.lora_B.weight"].fill_(value))
    assert f"NaN or infinite values in 1 tensors: {Q}.lora_B.weight" in refuse(saved)


def test_an_untrained_adapter(tmp_path, caplog):
    model = get_peft_model(make("llama"), LoraConfig())
    model.save_pretrained(tmp_path)
    assert "changes nothing" in caplog.text
    with pytest.raises(AdapterError, match="is untrained"):
        PeftModel.from_pretrained(make("llama"), tmp_path, allow_untrained=False)
    with pytest.warns(UserWarning, match="is untrained"):
        PeftModel.from_pretrained(make("llama"), tmp_path)
    PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)


def test_all_errors_at_once(saved):
    def spoil(tensors):
        tensors.pop(f"{Q}.lora_A.weight")
        tensors["base_model.model.other"] = torch.ones(1)
        tensors[f"{Q}.lora_B.weight"] = torch.ones(3, 3)

    change(saved, spoil)
    message = refuse(saved)
    assert "missing tensors" in message and "unexpected tensors" in message and "wrong shapes" in message


def test_another_base_of_the_same_shape(saved):
    message = refuse(saved, seed=1)
    assert "was trained on" in message and "its weights differ" in message and "allow_other_base" in message
    PeftModel.from_pretrained(make("llama", seed=1), saved, allow_other_base=True)


def test_another_architecture(saved):
    assert "architecture is 'opt', expected 'llama'" in refuse(saved, base="opt")
    (saved / "lorakeet.json").unlink()  # an adapter of another tool: its tensors tell
    refuse(saved, kind=LorakeetError, base="gpt2")


def test_the_same_base_in_bf16_is_the_same_base(saved):
    model = PeftModel.from_pretrained(make("llama").to(torch.bfloat16), saved)
    assert model(token_ids()).logits.dtype == torch.bfloat16


def test_a_pickle_is_refused_by_name(saved):
    (saved / "adapter_model.safetensors").unlink()
    torch.save({}, saved / "adapter_model.bin")
    message = refuse(saved)
    assert "adapter_model.bin" in message and "pickle" in message and "safetensors" in message


@pytest.mark.parametrize("keep", [0, 5, 200, -10])
def test_a_truncated_file(saved, keep):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "adapter_model.safetensors is damaged" in refuse(saved)


def test_a_missing_adapter(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refuse(tmp_path / "empty")
    assert "does not exist" in refuse(tmp_path / "nowhere")
    assert "is a file" in refuse(saved / "adapter_config.json")
    assert "not a folder here" in refuse("nobody/nothing")
    (saved / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refuse(saved)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_config(saved, text):
    (saved / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refuse(saved)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_notes(saved, text):
    (saved / "lorakeet.json").write_text(text)
    assert "lorakeet.json" in refuse(saved)


def test_keys_of_a_newer_peft_are_kept_or_refused(saved):
    file = saved / "adapter_config.json"
    values = json.loads(file.read_text()) | {"shiny_new_thing": None, "another": {}, "peft_version": "0.99"}
    file.write_text(json.dumps(values))
    model = PeftModel.from_pretrained(make("llama"), saved)
    model.save_pretrained(saved.parent / "again")
    again = json.loads((saved.parent / "again" / "adapter_config.json").read_text())
    assert again == values
    file.write_text(json.dumps(values | {"shiny_new_thing": 3}))
    assert "shiny_new_thing=3" in refuse(saved, kind=ConfigError)
    file.write_text(json.dumps(values | {"peft_type": "IA3"}))
    assert "'IA3'" in refuse(saved, kind=ConfigError)


def test_nothing_is_saved_that_is_not_finite(tmp_path):
    model = get_peft_model(make("llama"), LoraConfig())
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="v_proj.lora_A"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_pickles(tmp_path):
    model = get_peft_model(make("llama"), LoraConfig())
    with pytest.raises(AdapterError, match="pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path, saved):
    model = PeftModel.from_pretrained(make("llama"), saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OutputError):
        model.save_pretrained(tmp_path / "file" / "below")


def test_an_unknown_argument_is_an_error_and_those_of_peft_are_accepted(saved):
    with pytest.raises(TypeError, match="lora_alfa"):
        get_peft_model(make("llama"), LoraConfig(), lora_alfa=3)
    with pytest.raises(TypeError, match="path_initial_modell"):
        PeftModel.from_pretrained(make("llama"), saved).save_pretrained(saved, path_initial_modell="x")
    base = make("llama")
    with pytest.raises(TypeError, match="is_trainabel"):
        PeftModel.from_pretrained(base, saved, is_trainabel=True)
    assert not isinstance(base, PeftModel)
    PeftModel.from_pretrained(make("llama"), saved, low_cpu_mem_usage=True, torch_device="cpu")


def test_several_adapters_in_their_own_folders(tmp_path, saved):
    model = PeftModel.from_pretrained(make("llama"), saved)
    first = model(token_ids()).logits
    model.add_adapter("other", LoraConfig(target_modules=["up_proj"]))
    shake(model, "other", seed=5)
    model.set_adapter("other")
    second = model(token_ids()).logits
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "both")
    again.load_adapter(tmp_path / "both", "other", subfolder="other")
    assert torch.equal(again(token_ids()).logits, first)
    again.set_adapter("other")
    assert torch.equal(again(token_ids()).logits, second)
    again.load_adapter(saved, "third")
    again.set_adapter("third")
    assert torch.equal(again(token_ids()).logits, first)


def test_weights_can_be_loaded_into_the_adapter_that_is_there(saved):
    model = PeftModel.from_pretrained(make("llama"), saved, is_trainable=True)
    wanted = model(token_ids()).logits
    shake(model, seed=77)
    model.load_adapter(saved, "default", is_trainable=True)
    model.eval()
    assert torch.equal(model(token_ids()).logits, wanted)
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


def test_loaded_for_inference_nothing_is_trainable(saved):
    model = PeftModel.from_pretrained(make("llama"), saved)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert PeftConfig.from_pretrained(saved).inference_mode is True
    assert PeftConfig.from_pretrained(saved, inference_mode=False).inference_mode is False


def test_the_format(saved):
    values = json.loads((saved / "adapter_config.json").read_text())
    assert values["lora_alpha"] == 8 and type(values["lora_alpha"]) is int
    assert len(values) == 41 and values["peft_type"] == "LORA"
    own = json.loads((saved / "lorakeet.json").read_text())
    assert own["format"] == 1 and own["base"]["fingerprint"]["architecture"] == "llama"
    assert set(load_file(saved / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{i}.self_attn.{p}.lora_{m}.weight"
        for i in range(3)
        for p in ("q_proj", "v_proj")
        for m in "AB"
    }
