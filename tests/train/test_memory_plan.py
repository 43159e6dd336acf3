"""Memory plan: size of the largest pass, bytes that it keeps, chosen layers, messages; and free memory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from helpers.tiny_training import tiny_data, tiny_llama, tiny_peft
from lorakeet.patches.fused_layers import fused_layers
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.gradient_checkpointing import checkpointable_layers
from lorakeet.patches.padding_free import padding_free
from lorakeet.train.guards import preflight
from lorakeet.train.memory_plan import (
    SHARE,
    _kept,
    _left_of_limits,
    _two_samples,
    every_that_fits,
    free_memory,
    largest_pass,
)
from lorakeet.train.trainer import Trainer


def with_lengths(data: datasets.Dataset) -> datasets.Dataset:
    return data.map(lambda row: {"length": len(row["input_ids"])})


@pytest.fixture
def make_trainer(make_args: Any, collator: Any) -> Any:
    def make(model: Any = None, data: Any = None, **settings: Any) -> Trainer:
        data = with_lengths(tiny_data()) if data is None else data
        args = make_args(gradient_accumulation_steps=4, include_num_input_tokens_seen="no")
        model = tiny_peft(0.3) if model is None else model
        return Trainer(model, args, train_dataset=data, data_collator=collator, **settings)

    return make


@pytest.mark.parametrize(
    ("budget", "longest", "without_padding", "tokens"),
    [
        (0, 17, True, 4 * 17),
        (100, 17, True, 100),
        (1000, 17, True, 4 * 4 * 17),  # all tokens of a step
        (30, 17, True, 4 * 17),  # one micro-batch above the budget
        (1000, 17, False, 4 * 17),
    ],
)
def test_the_largest_pass(budget: int, longest: int, without_padding: bool, tokens: int, make_trainer: Any) -> None:
    assert largest_pass(make_trainer(token_budget=budget), longest, without_padding) == tokens


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_less_free_memory_means_more_checkpointed_layers(fast: bool, make_trainer: Any, caplog: Any) -> None:
    caplog.set_level("INFO", logger="lorakeet")
    model = tiny_peft(0.3).eval()
    trainer = make_trainer(model, token_budget=150)
    before = torch.get_rng_state()
    with ExitStack() as around:
        if fast:
            for context in (padding_free, fused_loss, fused_layers):
                around.enter_context(context(model))
        assert every_that_fits(trainer, 10**9, 64) is None and not caplog.text
        found = [every_that_fits(trainer, free, 64) for free in range(100_000, 2_000_000, 20_000)]
    assert set(found) == {1, 2, None}  # two layers: both, the first alone, none
    assert found == sorted(found, key=lambda every: every or 3)
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    said = caplog.text
    tokens = 150 if fast else 4 * 17
    assert f"all layers are checkpointed: a pass of {tokens} tokens would need 0.00 GB" in said
    assert "layer 0 is checkpointed" in said
    assert "and may not fit: lower train.token_budget, train.batch_size or data.max_length" in said
    assert not any(layer._forward_pre_hooks for layer in checkpointable_layers(model))


def test_gradients_and_moments_need_memory_too(make_trainer: Any) -> None:
    trainer = make_trainer(tiny_llama())  # all parameters are trainable
    samples, longest = _two_samples(trainer.train_dataset, 64)
    need = _kept(trainer, samples).peak(None) * largest_pass(trainer, longest, False) / (2 * longest)
    enough = (need + preflight.checkpoint_bytes(trainer.model)) / SHARE
    assert preflight.checkpoint_bytes(trainer.model) > 12 * 20_000
    assert every_that_fits(trainer, int(enough) + 2, 64) is None
    assert every_that_fits(trainer, int(enough) - 2, 64) == 2


def test_a_stream_is_measured_by_its_first_samples(make_trainer: Any) -> None:
    stream = with_lengths(tiny_data()).to_iterable_dataset()
    trainer = make_trainer(data=stream)
    assert every_that_fits(trainer, 10**9, 64) is None
    assert every_that_fits(trainer, 10**5, 64) == 1


def test_unknown_free_memory_means_no_checkpointing(make_trainer: Any) -> None:
    assert every_that_fits(make_trainer(), None, 64) is None
    model = tiny_llama()
    type(model).supports_gradient_checkpointing, was = False, type(model).supports_gradient_checkpointing
    try:
        assert every_that_fits(make_trainer(model), 1, 64) is None
    finally:
        type(model).supports_gradient_checkpointing = was


# ---- free memory ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux reports it")
def test_free_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    free = free_memory(cpu)
    assert free is not None and 10**6 < free < total * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = free_memory(cpu)
    assert shared is not None and shared == pytest.approx(free / 4, rel=0.3)
    assert free_memory(torch.device("meta")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_free_memory_of_a_gpu_includes_unused_memory_of_torch() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = free_memory(device)
    held = torch.ones(2**28, device=device)
    during = free_memory(device)
    del held
    after = free_memory(device)
    assert before is not None and during is not None and after is not None
    assert during < before - 2**29 and abs(after - before) < 2**28


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_control_groups(tmp_path: Path) -> None:
    member, root = tmp_path / "cgroup", tmp_path / "fs"
    assert _left_of_limits(member, root) == []
    member.write_text("0::/a/b\n")
    assert _left_of_limits(member, root) == []
    group(root / "a" / "b", memory__max="max", memory__current="5", memory__stat="anon 3\ninactive_file 2")
    group(root / "a", memory__max="1000", memory__current="700", memory__stat="anon 3\ninactive_file 200")
    assert _left_of_limits(member, root) == [500]
    group(root, memory__max="100", memory__current="700", memory__stat="inactive_file 2")
    assert sorted(_left_of_limits(member, root)) == [0, 500]


def test_limits_of_the_first_version(tmp_path: Path) -> None:
    member, root = tmp_path / "cgroup", tmp_path / "fs"
    member.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    group(
        root / "memory" / "job",
        memory__limit_in_bytes="9000",
        memory__usage_in_bytes="4000",
        memory__stat="inactive_file 1\ntotal_inactive_file 500",
    )
    assert _left_of_limits(member, root) == [5500]
