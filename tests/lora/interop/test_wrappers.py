"""Names of parameters without the names of wrappers: of torch.compile, DDP, FSDP, checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from helpers.tiny import make, shake
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError
from lorakeet.lora.interop.wrappers import bare, canonical, canonical_keys

SETTINGS = {"r": 2, "target_modules": ["q_proj"]}


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def keys(folder: Path) -> list[str]:
    return sorted(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.a.b", "a.b"),
        ("a._orig_mod.0._fsdp_wrapped_module.b", "a.0.b"),
        ("_checkpoint_wrapped_module", ""),
        ("module.a", "module.a"),  # a model may have a part of this name
        ("a._orig_module.b", "a._orig_module.b"),
    ],
)
def test_canonical(name: str, plain: str) -> None:
    assert canonical(name) == plain


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("own", [["a.w", "b.w"], ["module.w", "b.w"], ["a._orig_mod.w", "b.w"]])
def test_state_dicts_of_wrappers_get_the_models_keys(prefix: str, own: list[str]) -> None:
    given = {prefix + name: name for name in own}
    assert canonical_keys(given, dict.fromkeys(own)) == {name: name for name in own}


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", "_orig_mod.model.*q_proj", ["_orig_mod.lm_head"]])
def test_an_adapter_on_a_compiled_model_is_that_of_the_model(targets: list[str] | str, tmp_path: Path) -> None:
    wrapped = get_peft_model(compiled(make("opt")), LoraConfig(r=2, target_modules=targets))
    assert type(wrapped).__name__ == "OPTForCausalLM" and wrapped._compiled_call_impl is not None
    plain = LoraConfig(r=2, target_modules=wrapped.peft_config["default"].target_modules)
    assert [name for name, _ in get_peft_model(make("opt"), plain).named_parameters()] == [
        name for name, _ in wrapped.named_parameters()
    ]
    wrapped.save_pretrained(tmp_path)
    assert not any(b"_orig_mod" in path.read_bytes() for path in tmp_path.iterdir())


def test_wrapped_parts_are_unwrapped_and_stay_compiled() -> None:
    model = make("llama")
    inner = model.model.layers[1]
    mlp = inner.mlp
    model.model.layers[1] = compiled(inner)
    inner.mlp = compiled(mlp)
    assert bare(compiled(model)) is model
    assert model.model.layers[1] is inner
    assert all(module._compiled_call_impl is not None for module in (model, inner, mlp)) and inner.mlp is mlp
    assert not any("_orig_mod" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
def test_parts_that_are_wrapped_later_keep_their_names_in_files(wrap, tmp_path: Path) -> None:
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS, modules_to_save=["norm"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    shake(model)
    model.save_pretrained(tmp_path / "before")
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    model.model.layers[0] = wrap(model.model.layers[0])
    model.model.layers[1].self_attn = wrap(model.model.layers[1].self_attn)
    model.save_pretrained(tmp_path / "after")
    assert keys(tmp_path / "after") == keys(tmp_path / "before")
    shake(model, seed=8)
    model.restore_adapters(tmp_path / "after")
    found = {canonical(key): value for key, value in model.state_dict().items()}
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_file_with_names_of_a_wrapper_is_read(tmp_path: Path) -> None:
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS))
    shake(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {key.replace("model.model.", "model._orig_mod.model."): value for key, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    again = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_for_several_devices_is_refused_and_unchanged(inside: bool, tmp_path: Path) -> None:
    model = make("llama")
    get_peft_model(make("llama"), LoraConfig(**SETTINGS)).save_pretrained(tmp_path)
    wrapped: nn.Module = nn.DataParallel(model)
    if inside:
        model.model.layers[0] = nn.DataParallel(model.model.layers[0])
        wrapped = model
    before = [name for name, _ in wrapped.named_modules()]
    for act in (
        lambda: get_peft_model(wrapped, LoraConfig(**SETTINGS)),
        lambda: PeftModel.from_pretrained(wrapped, tmp_path),
    ):
        with pytest.raises(AdapterError, match="wrapped as DataParallel"):
            act()
    assert [name for name, _ in wrapped.named_modules()] == before
