"""A run that continues from an adapter begins where the adapter ended, with its settings of LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import AdapterError, BaseModelError, ConfigError
from lorakeet.train.run import run_training


@pytest.fixture
def first(settings: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """Train the adapter to continue from."""
    run_training(settings(lora__r=2, lora__lora_alpha=6, train__lr=0.05, out=str(tmp_path / "first")))
    return tmp_path / "first"


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def further(first: Path, *words: str) -> RunConfig:
    """Return the settings of the first run without those of LoRA, and with it as the start."""
    tree = read_run(first / "run.yaml").model_dump(mode="json", exclude={"lora"})
    second = {"train.init_adapter": str(first), "out": str(first.parent / "second")}
    return read_run(
        None, words, {**{f"{s}.{k}": v for s in ("base", "data", "train") for k, v in tree[s].items()}, **second}
    )


def test_it_begins_at_the_loss_at_which_the_adapter_ended(first: Path) -> None:
    summary = run_training(further(first, "train.steps=2"))
    before = summary_of(first)
    assert summary["eval_loss_before"] == before["eval_loss_after"]
    assert summary["eval_loss_after"] != before["eval_loss_after"]
    assert summary["lora"] == before["lora"] and (summary["lora"]["r"], summary["lora"]["lora_alpha"]) == (2, 6)
    again = read_run(first.parent / "second" / "run.yaml", [f"out={first.parent / 'third'}"])
    run_training(again)  # the complete settings of the run repeat it
    files = [first.parent / name / "adapter" / "adapter_model.safetensors" for name in ("second", "third")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_other_settings_than_those_of_the_adapter_are_refused(first: Path) -> None:
    with pytest.raises(ConfigError, match="lora.r = 4: expected 2 as in the adapter") as caught:
        run_training(further(first, "lora.r=4"))
    assert caught.value.hint and not (first.parent / "second").exists()
    with pytest.raises(AdapterError, match="does not exist"):
        run_training(further(first, "train.init_adapter=./none"))


def test_an_adapter_given_as_the_model_leads_to_the_flag(first: Path) -> None:
    for path in (first, first / "adapter"):
        with pytest.raises(BaseModelError, match="is an adapter") as caught:
            run_training(further(first, "train.init_adapter=null", f"base.model={path}"))
        assert f"--init-adapter {first / 'adapter'}" in (caught.value.hint or "")
