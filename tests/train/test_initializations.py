"""Runs that begin with PiSSA, EVA or LoftQ: the same losses after a stop, and a saved adapter that any tool reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.config import RunConfig
from lorakeet.errors import AdapterError, ConfigError
from lorakeet.rank.report import rank_report
from lorakeet.train.run import run_training

FILE = "adapter_model.safetensors"


def adapter_of(folder: Path) -> dict:
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())


@pytest.mark.parametrize("how", ["pissa", pytest.param("eva", marks=pytest.mark.slow)])
def test_a_run_and_its_adapter(how: str, settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = {"lora__r": 4, "lora__init_lora_weights": how, "train__steps": 4, "train__save_every": 2}
    summary = run_training(settings(**run, out=str(tmp_path / "run")))
    plain = run_training(settings(**{**run, "lora__init_lora_weights": True}, out=str(tmp_path / "plain")))
    assert summary["eval_loss_before"] == pytest.approx(plain["eval_loss_before"], rel=1e-5)
    assert summary["eval_loss_after"] != plain["eval_loss_after"]
    saved = adapter_of(tmp_path / "run")
    assert (saved["r"], saved["init_lora_weights"]) == ((8, True) if how == "pissa" else (4, "eva"))
    base = tf.AutoModelForCausalLM.from_pretrained(settings(**run).base.model, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(ids).logits
    model = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert not torch.allclose(model(ids).logits, before, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, before)  # the base is whole
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    if how == "pissa":
        with pytest.raises(AdapterError, match="acts on a base without the part that pissa took"):
            rank_report(checkpoint)
        readers = inspect_adapter(checkpoint)["readers"]
        assert not readers["vLLM"]["can"] and readers["peft"]["can"]


def test_loftq_needs_a_quantized_base(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = {"lora__r": 4, "lora__init_lora_weights": "loftq", "train__steps": 2, "out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="what quantization loses"):
        run_training(settings(**run))
    run_training(settings(**run, base__bits=8))
    assert adapter_of(tmp_path / "run")["loftq_config"] == {"loftq_bits": 8, "loftq_iter": 1}
    assert any(
        tensor.any() for key, tensor in load_file(tmp_path / "run" / "adapter" / FILE).items() if "lora_B" in key
    )
