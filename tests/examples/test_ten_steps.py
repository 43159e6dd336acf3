"""The tour's script runs to the end on a tiny model, and (slow) on the real one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_base import furnish
from lorakeet.config import DEFAULT_MODEL

SCRIPT = Path(__file__).parents[2] / "examples" / "ten_steps.py"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    return runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return run(monkeypatch, "--steps", "2", "--base", str(tmp_path / DEFAULT_MODEL), "--out", "adapter")


def test_ten_steps(ran: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = capsys.readouterr().out
    assert "trainable params: " in out and "base:    Two things are infinite:" in out
    assert ran["trainer"].state.global_step == 2
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in tensors.items() if ".lora_B." in key)
    assert ran["config"].base_model_name_or_path == str(tmp_path / DEFAULT_MODEL)
    assert (ran["config"].r, ran["config"].lora_alpha, ran["config"].lora_dropout) == (16, 32, 0.05)
    trained = dict(ran["trainer"].model.named_parameters())
    loaded = dict(ran["model"].named_parameters())
    assert all(torch.equal(loaded[key], trained[key]) for key in loaded if ".lora_" in key)


def test_the_end_is_learned_and_padding_is_not(ran: dict[str, Any]) -> None:
    trainer = ran["trainer"]
    samples = [trainer.train_dataset[i] for i in range(4)]
    assert len({len(sample["input_ids"]) for sample in samples}) > 1  # needs padding
    batch = trainer.data_collator([{"input_ids": sample["input_ids"]} for sample in samples])
    end = trainer.data_collator.tokenizer.eos_token_id
    for row, sample in zip(batch["labels"], samples, strict=True):
        length = len(sample["input_ids"])
        assert row[length - 1] == end and (row[length:] == -100).all() and (row[:length] != -100).all()


@pytest.mark.slow
def test_ten_steps_on_the_real_base(real_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(monkeypatch, "--steps", "1", "--out", "adapter")
    assert ran["config"].base_model_name_or_path == DEFAULT_MODEL
    assert ran["trainer"].model.get_nb_trainable_parameters() == (921_600, 135_436_608)
    assert ran["quotations"].num_rows == 12_363
    assert not torch.equal(ran["before"], torch.zeros_like(ran["before"])) and ran["after"].shape[0] == 1
