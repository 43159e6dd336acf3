"""VeRA in a run: the vectors learn, and the adapter that is saved answers as the one that was trained."""

from __future__ import annotations

import json

from helpers.tiny_training import tiny_llama
from lorakeet import PeftModel
from lorakeet.train.run import run_training


def test_a_run_saves_the_vectors(base_folder, settings, tmp_path, caplog) -> None:
    config = settings(lora={"vera_config": True, "r": 64, "target_modules": ["q_proj", "v_proj"]}, train__lr=0.5)
    summary = run_training(config)
    assert "larger than every layer" not in caplog.text  # the rank of a layer is no bound of random matrices
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "VERA"
    model = PeftModel.from_pretrained(tiny_llama(initializer_range=0.2), tmp_path / "run" / "adapter")
    assert summary["trainable_parameters"] == 2 * (64 + 32) + 2 * (64 + 16)
    assert all(layer.part("lora_lambda_b", "default").any() for layer in model.lora_layers())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.01
