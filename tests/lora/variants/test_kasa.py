"""KaSA: the base is whole where the adapter does not act, adapters add up, the penalty is that of ``peft``."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.tiny import make
from lorakeet import KasaConfig, LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError, ConfigError, TargetError
from lorakeet.quant.quantize import quantize_

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), Conv1D(10, 12))


def config(r: int = 3, library=None, **more):
    kind = library.KasaConfig if library else KasaConfig
    settings = {"r": r, "target_modules": ["0", "2"], "init_lora_weights": False, "kasa_config": kind(), **more}
    return (library.LoraConfig if library else LoraConfig)(**settings)


def without_smallest(weight: torch.Tensor, r: int) -> torch.Tensor:
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    sigma[-r:] = 0
    return u * sigma @ vh


def test_the_base_is_whole_where_no_adapter_acts(base: nn.Sequential, tmp_path: Path) -> None:
    expected = base(X)
    model = get_peft_model(copy.deepcopy(base), config(init_lora_weights=True)).eval()
    cut = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (cut[0], cut[2]):
            layer.weight.copy_(without_smallest(layer.weight, 3))
    torch.testing.assert_close(model(X), cut(X))
    with model.disable_adapter():
        torch.testing.assert_close(model(X), expected)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.add_adapter("second", config(r=2))
    model.set_adapter("second")
    alone = model(X)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second")
    torch.testing.assert_close(again(X), alone)
    model.merge_adapter()
    torch.testing.assert_close(model(X), alone)
    model.unmerge()
    torch.testing.assert_close(model.unload()(X), expected)


def test_the_penalty_is_that_of_peft(base: nn.Sequential) -> None:
    ours = get_peft_model(copy.deepcopy(base[:1]), config(target_modules=["0"]))
    theirs = peft.get_peft_model(copy.deepcopy(base[:1]), config(library=peft, target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs.get_parameter(f"base_model.model.{name}").copy_(parameter)
    mine, other = ours._get_kasa_loss(), theirs.base_model._get_kasa_loss()
    torch.testing.assert_close(mine, other)
    mine.backward()
    assert ours[0].lora_diag["default"].grad is not None
    assert get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0"]))._get_kasa_loss() == 0.0


def test_what_kasa_cannot_do_is_refused(base: nn.Sequential, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="KaSA requires `r`"):
        get_peft_model(copy.deepcopy(base), config(r=10))
    with pytest.raises(ConfigError, match="`beta` must be non-negative"):
        KasaConfig(beta=-1.0)
    with pytest.raises(ConfigError, match="init_lora_weights='pissa'"):
        config(init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="no form as plain LoRA"):
        get_peft_model(copy.deepcopy(base), config()).save_pretrained(tmp_path, plain_lora=True)
    model = make("llama").requires_grad_(False)
    assert quantize_(model)
    with pytest.raises(TargetError, match="is quantized, and KaSA"):
        get_peft_model(model, config(target_modules=["q_proj"]))
