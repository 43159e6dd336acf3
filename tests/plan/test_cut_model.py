"""A pass of a whole model, predicted by a model cut to a few layers, against a pass that is counted."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_models import ragged, small
from lorakeet.base.load import ModelInfo, inspect_model, load_base
from lorakeet.config import TrainSettings, make_run
from lorakeet.patches.gradient_checkpointing import checkpointable_layers, gradient_checkpointing
from lorakeet.patches.of_training import training_patches
from lorakeet.plan.cut_model import cut, whole_model
from lorakeet.plan.live_bytes import LiveBytes
from lorakeet.plan.measure_pass import measure_pass
from lorakeet.plan.pass_cost import PassCost
from lorakeet.tasks.task import Task

CPU = torch.device("cpu")
LAYERS = 6


def loss_of(model: Any, batch: dict[str, Any]) -> Any:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels).loss


def small_run(kind: str, bits: int | None = None, **lora: Any) -> tuple[Any, Any]:
    """Return settings and configuration of a run on a small model of several layers."""
    changes: dict[str, Any] = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 160}
    if kind == "gemma2":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    base = {"bits": bits, "dtype": "fp32", "device": "cpu"}
    run = make_run({"base": base, "lora": {"target_modules": "all-linear", "r": 2, **lora}})
    return run, ModelInfo("small", small(kind, use_cache=False, **changes).config, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kind", ["llama", "opt", "gemma2"])
def test_a_few_layers_tell_the_bytes_of_all(kind: str, bits: int | None) -> None:
    run, found = small_run(kind, bits)
    batch = ragged(lengths=[40] * 7 + [3])
    costs = []
    for shorten in (True, False):
        model = whole_model(run, found, Task())
        layers = checkpointable_layers(model)
        made = cut(model, CPU, every_layer=not shorten)
        few_layers = 4 if kind == "gemma2" else 3
        assert len(made.standing) == LAYERS and len(made.layers) == (few_layers if shorten else LAYERS)
        with training_patches(model, TrainSettings()):
            loss_of(model, batch).backward()  # allocates the workspace
            parts = measure_pass(model, made.layers, lambda model=model: loss_of(model, batch), batch)
        costs.append(PassCost(283, made.whole(parts)))
        assert len(layers) == LAYERS
    few, every = costs
    ran = [[part.layer for part in cost.parts if part.layer is not None] for cost in costs]
    assert ran[0] == ran[1] == [*range(LAYERS), *reversed(range(LAYERS))]
    for n in (None, 1, 2, 3):
        assert few.peak(n) == pytest.approx(every.peak(n), rel=0.02)
    assert few.kept() == pytest.approx(every.kept(), rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma2"])
def test_the_peak_with_checkpoints_is_that_of_a_counted_pass(kind: str) -> None:
    run, found = small_run(kind)
    batch = ragged(lengths=[40] * 7 + [3])
    model = whole_model(run, found, Task())
    made = cut(model, CPU, every_layer=True)
    with training_patches(model, TrainSettings()):
        parts = measure_pass(model, made.layers, lambda: loss_of(model, batch), batch)
        predicted, counted = [], []
        for every in (None, 3, 2, 1):
            with ExitStack() as around:
                if every:
                    around.enter_context(gradient_checkpointing(model, every))
                live = around.enter_context(LiveBytes(model, batch))
                loss_of(model, batch).backward()
            counted.append(live.most)
            predicted.append(PassCost(283, made.whole(parts)).peak(every))
    assert counted == sorted(counted, reverse=True) and predicted == sorted(predicted, reverse=True)
    ratios = [one / other for one, other in zip(predicted, counted, strict=True)]
    assert min(ratios) > 0.9 and max(ratios) < 1.15, ratios


def test_layers_below_the_lowest_adapter_keep_nothing() -> None:
    run, found = small_run("llama", layers_to_transform=[4])
    model = whole_model(run, found, Task())
    made = cut(model, CPU)
    batch = ragged()
    parts = made.whole(measure_pass(model, made.layers, lambda: loss_of(model, batch), batch))
    kept = {part.layer: part.kept for part in parts if not part.backward and part.layer is not None}
    assert kept[2] <= 0 < kept[4] and kept[5] > 0


def test_the_cut_model_has_the_parts_of_the_loaded_one(base_folder: Path) -> None:
    base = {"model": str(base_folder), "device": "cpu", "dtype": "fp32", "bits": 8}
    run = make_run({"base": base, "lora": {"target_modules": "all-linear"}})
    model = whole_model(run, inspect_model(run.base), Task())
    shapes = {name: (p.shape, p.dtype) for name, p in load_base(run.base).model.named_parameters()}
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert {name: (p.shape, p.dtype) for name, p in frozen.items()} == shapes


def test_live_bytes_count_a_storage_once_and_forget_what_is_freed() -> None:
    weight = torch.ones(100)
    with LiveBytes(weight) as live:
        views = [weight[:10], weight.view(10, 10)]
        assert live.now == 0
        made = weight + 1
        more = made[:50]
        assert live.now == 400
        other = made * 2
        assert live.now == 800
        del made, more
        assert (live.now, live.most) == (400, 800)
        live.restart()
        assert live.most == 400
    del views, other
