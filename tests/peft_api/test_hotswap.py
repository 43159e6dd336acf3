"""Hot-swapping: the answers of the new adapter, without new parameters and without another compilation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from helpers.tiny import shake
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError
from lorakeet.peft_api.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(6, 8), nn.Conv1d(4, 4, 1, groups=2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.last(self.conv(h.view(-1, 4, 2)).flatten(1))


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


ALL = ["first", "conv", "last"]


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """Save adapters of several ranks and scales; return their folders and answers."""
    found = {}
    kinds = {
        "old": (4, 8, ALL),
        "new": (4, 3, ALL),
        "small": (2, 5, ALL),
        "large": (8, 16, ALL),
        "fewer": (4, 4, ["first"]),
    }
    for seed, (name, (r, alpha, targets)) in enumerate(kinds.items()):
        model = get_peft_model(base(), LoraConfig(r=r, lora_alpha=alpha, target_modules=targets))
        shake(model, seed=seed)
        model.save_pretrained(tmp_path / name)
        found[name] = (tmp_path / name, model.eval()(X).detach())
    return found


@pytest.mark.parametrize("name", ["new", "small", "large", "fewer"])
def test_the_new_adapter_answers_and_is_the_one_that_is_saved(saved, name: str, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(base(), saved["old"][0])
    kept = [id(parameter) for parameter in model.parameters()]
    hotswap_adapter(model, saved[name][0], "default", torch_device="cpu")
    torch.testing.assert_close(model(X), saved[name][1])
    assert [id(parameter) for parameter in model.parameters()] == kept
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "again")(X), saved[name][1])


def test_a_compiled_model_is_not_compiled_again(saved) -> None:
    model = PeftModel.from_pretrained(base(), saved["old"][0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(X), saved["old"][1])
    assert {layer.r["default"] for layer in model.lora_layers()} == {8}
    assert all(isinstance(layer.scaling["default"], torch.Tensor) for layer in model.lora_layers())
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), saved["old"][1])
        frames = counter.frame_count
        assert frames
        for name in ("new", "small", "large", "fewer", "old"):
            hotswap_adapter(compiled, saved[name][0], "default")
            torch.testing.assert_close(compiled(X), saved[name][1])
    assert counter.frame_count == frames


def test_tensors_by_the_names_of_the_model(saved) -> None:
    model, other = (PeftModel.from_pretrained(base(), saved[name][0]) for name in ("old", "new"))
    tensors = {key: tensor.clone() for key, tensor in other.state_dict().items() if ".lora_" in key}
    hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    torch.testing.assert_close(model(X), saved["new"][1])
    config = copy.deepcopy(other.peft_config["default"])
    with pytest.raises(AdapterError, match="unexpected keys found"):
        hotswap_adapter_from_state_dict(model, {"last.lora_C.default.weight": torch.ones(1)}, "default", config)


def test_what_cannot_be_swapped_is_refused_with_the_old_one_in_place(saved, tmp_path: Path) -> None:
    narrow = PeftModel.from_pretrained(base(), saved["fewer"][0])
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        hotswap_adapter(narrow, saved["new"][0], "default")
    torch.testing.assert_close(narrow(X), saved["fewer"][1])
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=ALL, use_rslora=True))
    with pytest.raises(ValueError, match="Configs are incompatible: for use_rslora"):
        hotswap_adapter(model, saved["new"][0], "default")
    with pytest.raises(ValueError, match="there is 'default'"):
        hotswap_adapter(model, saved["new"][0], "other")
    with pytest.raises(ValueError, match="original rank is larger"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(base())
    narrow.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(narrow, saved["fewer"][0], "default")
    compiled = torch.compile(get_peft_model(base(), LoraConfig(r=4, target_modules=ALL)), backend="eager")
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
