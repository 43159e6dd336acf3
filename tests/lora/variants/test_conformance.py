"""Variants × types of layers, each held against ``peft``: outputs, gradients, merged weights, files, several adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers.peft_twins import Twins
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import TargetError

pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"layer": 2},
        "alpha_pattern": {"layer": 5},
    },
    "BD-LoRA, blocks of A": {"use_bdlora": peft.BdLoraConfig(target_modules_bd_a=["lay"], nblocks=2)},
    "BD-LoRA, blocks of B": {"use_bdlora": peft.BdLoraConfig(target_modules_bd_b=["layer"], nblocks=2)},
    "KaSA": {"kasa_config": peft.KasaConfig()},
    "VeLoRA": {"velora_config": {"num_groups": 4, "scale": 0.8}},
    "VeLoRA, once": {"velora_config": peft.VeloraConfig(num_groups=3, init_type="batch_average_once")},
    "VeLoRA, random": {"velora_config": peft.VeloraConfig(num_groups=2, init_type="random")},
}
#: Variants of linear layers alone.
LINEAR_ONLY = ("BD-LoRA", "VeLoRA", "KaSA")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 8, bias=False), (2, 3, 6)),
    "Conv1D": (lambda: Conv1D(8, 6), (3, 6)),
    "Embedding": (lambda: nn.Embedding(11, 5), (0,)),
    "Conv1d": (lambda: nn.Conv1d(6, 5, 3, padding=1), (2, 6, 7)),
    "Conv2d": (lambda: nn.Conv2d(6, 5, (3, 2), stride=2, bias=False), (2, 6, 7, 8)),
    "Conv3d": (lambda: nn.Conv3d(6, 5, (1, 3, 2)), (2, 6, 3, 4, 5)),
    "Conv2d of groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
}


class Small(nn.Module):
    """The layer, and another one that is not adapted."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x))


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """Return a model with a layer of each type, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    x = torch.randint(11, (3, 4)) if shape == (0,) else torch.randn(shape)
    return Small(make()), x


def skip_other_layers(model: Any, variant: str) -> None:
    """Skip the test where a variant does not adapt the layer; it must say so."""
    if variant.startswith(LINEAR_ONLY) and not isinstance(model.layer, (nn.Linear, Conv1D)):
        with pytest.raises(TargetError, match=f"which {variant[:6]}.* cannot adapt"):
            get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["layer"], **VARIANTS[variant]))
        pytest.skip("refused")


def twins(model: Any, variant: str, **more: Any) -> Twins:
    skip_other_layers(model, variant)
    if variant.startswith(("BD", "KaSA")) and isinstance(model.layer, Conv1D):
        pytest.skip("peft fails on a Conv1D, or refuses it")
    return Twins(model, {"r": 4, "target_modules": ["layer"], **VARIANTS[variant], **more})


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(layer: tuple, variant: str) -> None:
    model, x = layer
    both = twins(model, variant)
    both.assert_same_outputs(x)
    both.assert_same_gradients(x)
    if getattr(model.layer, "groups", 1) == 1:
        both.assert_same_merge(x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_travel_both_ways(layer: tuple, variant: str, tmp_path: Path) -> None:
    model, x = layer
    both = twins(model, variant)
    both.ours.save_pretrained(tmp_path / "ours")
    both.theirs.save_pretrained(tmp_path / "theirs")
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    in_ours = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
    torch.testing.assert_close(in_peft(x), both.ours.eval()(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(in_ours(x), both.theirs.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "KaSA"])
def test_a_new_adapter_changes_nothing(layer: tuple, variant: str) -> None:
    model, x = layer
    skip_other_layers(model, variant)
    before = model(x)
    ours = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["layer"], **VARIANTS[variant]))
    torch.testing.assert_close(ours(x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("LoRA", "KaSA")])
def test_several_adapters_act_as_in_peft(layer: tuple, variant: str) -> None:
    model, x = layer
    both = twins(model, variant)
    both.add("plain", {"r": 2, "target_modules": ["layer"]})
    both.add("second", {"r": 2, "target_modules": ["layer"], **VARIANTS[variant], "rank_pattern": {}})
    for names in (["default", "plain"], ["plain", "default", "second"]):
        both.activate(names)
        both.assert_same_outputs(x)
    if getattr(model.layer, "groups", 1) == 1:
        both.assert_same_merge(x)
    alone = {}
    for name in ("default", "plain"):
        both.activate([name])
        alone[name] = both.ours.eval()(x)
    with both.ours.disable_adapter():
        torch.testing.assert_close(both.ours(x), model(x), rtol=0, atol=0)
    names = ["plain", "default", "__base__"][: len(x)]
    mixed = both.ours(x, adapter_names=[*names, *names[:1] * (len(x) - len(names))])
    for row, name in enumerate(names[:2]):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=0, atol=1e-5)
    both.ours.delete_adapter("default")
    both.activate(["second"], ours_only=True)
    torch.testing.assert_close(both.ours(x).isfinite().all(), torch.tensor(True))
    assert not any(".default" in name for name, _ in both.ours.named_parameters())
