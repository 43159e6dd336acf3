"""Large models are counted on the meta device, without weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.bytewise import llama_config
from lorakeet.base.meta_device import meta_model
from lorakeet.errors import BaseModelError

COUNTS = {"facebook/opt-6.7b": (6_658_473_984, 32), "bigscience/bloomz-7b1": (7_069_016_064, 30)}


@pytest.mark.parametrize("name", COUNTS)
def test_shipped_configs_have_the_public_size(name: str) -> None:
    model = meta_model(name)
    count, layers = COUNTS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.config.num_hidden_layers == layers
    assert model.name_or_path == model.config._name_or_path == name


@pytest.mark.slow
def test_seconds_and_little_memory() -> None:
    program = (
        "import time, lorakeet.base.meta_device as meta;"
        "from lorakeet.runs.process_memory import peak_rss_bytes; begin = time.perf_counter();"
        f"[meta.meta_model(name) for name in {list(COUNTS)}];"
        "print(time.perf_counter() - begin, peak_rss_bytes())"
    )
    seconds, peak = map(float, subprocess.check_output([sys.executable, "-c", program], text=True).split())
    assert seconds < 10
    assert peak < 2e9


def test_a_folder_needs_only_its_config(tmp_path: Path) -> None:
    llama_config(num_hidden_layers=5).save_pretrained(tmp_path)
    model = meta_model(str(tmp_path))
    assert len(model.model.layers) == 5
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_config_itself() -> None:
    assert len(meta_model(llama_config(num_hidden_layers=3)).model.layers) == 3


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no such model"):
        meta_model("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(BaseModelError, match="nonesuch"):
        meta_model(str(tmp_path))
