"""A base that is sharded over processes trains as one that is whole in each, and as a single process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from helpers.processes import in_processes, settings
from helpers.tiny_training import tiny_llama, tiny_peft
from lorakeet.adapter.fingerprint import fingerprint
from lorakeet.config import read_run
from lorakeet.errors import TrainingError
from lorakeet.quant.quantize import quantize_
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.train import run
from lorakeet.train.processes.launch import join_processes
from lorakeet.train.processes.sharding import check_can_shard, shard_base, sharded_parameters

WEIGHTS = "adapter/adapter_model.safetensors"


def train(file: Path, kill_at: int | None = None) -> dict[str, Any]:
    """Run a training; process 1 is killed before a step if told so."""

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == kill_at and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)

    made = run.ProgressCallback

    class Progress(made):  # type: ignore[misc, valid-type]
        on_step_begin = Kill.on_step_begin

    run.ProgressCallback = Progress
    return run.run_training(read_run(file))


def curve(folder: Path, *keys: str) -> list[float]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [line[key] for line in lines for key in keys if key in line]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, None])
def test_a_sharded_base_trains_as_a_whole_one(
    tmp_path: Path, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKEET_INT8", "blocked")  # no activation or gradient is rounded, on any processor
    common = {"save_every": 2, "gradient_checkpointing": 2, "lr": 0.005}
    for name, processes, changes in [("one", 1, {"grad_accum": 4}), ("whole", 2, {}), ("shards", 2, {"fsdp": True})]:
        outcomes = in_processes(train, settings(tmp_path, name, bits, **common, **changes), processes=processes)
        assert [outcome.error for outcome in outcomes] == [None] * processes, outcomes
    one, whole, shards = (tmp_path / name for name in ("one", "whole", "shards"))
    assert (shards / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert curve(shards, "loss", "eval_loss", "grad_norm") == curve(whole, "loss", "eval_loss", "grad_norm")
    assert curve(shards, "loss", "eval_loss") == pytest.approx(curve(one, "loss", "eval_loss"), abs=1e-5)
    for name, tensor in load_file(one / WEIGHTS).items():
        assert (load_file(shards / WEIGHTS)[name] - tensor).abs().max() < 1e-4, name


@pytest.mark.slow
def test_a_sharded_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    whole, parts = (settings(tmp_path, name, 8, save_every=2, fsdp=True) for name in ("whole", "parts"))
    assert [outcome.error for outcome in in_processes(train, whole)] == [None, None]
    first, second = in_processes(train, parts, 5)
    assert second.exit_code == -signal.SIGKILL and "ended without a message" in (first.error or "")
    assert [outcome.error for outcome in in_processes(train, parts)] == [None, None]
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def shard() -> tuple[set[str], list[str], bool]:
    """Shard a tiny 8-bit base; return dtypes of the shards, names of other frozen weights, and a comparison."""
    join_processes(torch.device("cpu"))
    model = tiny_peft(0.0)
    quantize_(model)
    before = fingerprint(model)
    shard_base(model, torch.device("cpu"), 2)
    shards = {str(p.dtype) for p in model.parameters() if isinstance(p, DTensor)}
    whole = [name for name, p in model.named_parameters() if not (isinstance(p, DTensor) or p.requires_grad)]
    return shards, whole, fingerprint(model) == before


@pytest.mark.slow
def test_8_bit_weights_and_scales_are_sharded_as_they_are() -> None:
    for outcome in in_processes(shard):
        assert outcome.error is None
        shards, whole, same_fingerprint = outcome.result
        assert shards == {"torch.int8", "torch.float32"} and same_fingerprint
        assert all("norm" in name or "embed" in name or "head" in name for name in whole)


def test_adapters_norms_and_embeddings_are_not_sharded() -> None:
    chosen = sharded_parameters(tiny_peft(0.0))
    assert chosen and all("layers." in name and "lora_" not in name and "norm" not in name for name in chosen)


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(TrainingError, match="only one"):
        check_can_shard(tiny_peft(0.0), 1)
    with pytest.raises(TrainingError, match="Linear has no frozen layers that can be sharded"):
        check_can_shard(torch.nn.Linear(2, 2), 2)
    with pytest.raises(TrainingError, match="no frozen layers"):
        check_can_shard(tiny_llama(), 2)  # trains whole


def test_groups_that_do_not_divide_the_processes_are_refused() -> None:
    for size in (1, 3):
        with pytest.raises(TrainingError, match=f"train.fsdp_size={size} does not divide 4 processes"):
            check_can_shard(tiny_peft(0.0), 4, size)


def shard_in_groups() -> tuple[int, int]:
    """Shard over two groups of two; return the rows of a weight, here and in whole."""
    join_processes(torch.device("cpu"))
    model = tiny_peft(0.0)
    shard_base(model, torch.device("cpu"), 4, 2)
    weight: Any = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    return weight.to_local().shape[0], weight.shape[0]


@pytest.mark.slow
def test_each_group_holds_a_whole_base() -> None:
    assert [outcome.result for outcome in in_processes(shard_in_groups, processes=4)] == [(32, 64)] * 4
