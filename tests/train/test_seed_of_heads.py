"""Whatever is drawn at random in a run is drawn from its seed: fresh heads and the adapter's A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.task_runs import run_of
from lorakeet import api
from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.base.load import load_base
from lorakeet.config import BaseSettings
from lorakeet.tasks.task import Task
from lorakeet.train import run


def beginning(
    tmp_path: Path, kind: str, task: str, seed: int, before: int, patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Return the trainable weights with which a run begins, after ``before`` seeded torch."""
    found: dict[str, Any] = {}

    def stop(self: run.Run, *_: Any) -> dict[str, Any]:
        found.update({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})
        return {}

    patch.setattr(run.Run, "train", stop)
    config = run_of(tmp_path / f"{seed}-{before}", kind, task, task__type=task, train__seed=seed)
    torch.manual_seed(before)
    run.run_training(config)
    return found


@pytest.mark.parametrize(
    ("kind", "task"),
    [("bert", "SEQ_CLS"), pytest.param("bert", "QUESTION_ANS", marks=pytest.mark.slow), ("llama", "SEQ_CLS")],
)
def test_the_seed_decides_head_and_adapter(
    kind: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = (
        beginning(tmp_path, kind, task, seed, before, monkeypatch) for seed, before in ((1, 5), (1, 6), (2, 5))
    )
    assert any(".modules_to_save." in name for name in first) and any(".lora_A." in name for name in first)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, other[name]) == (not weight.any() or "norm" in name.lower()), name


def test_a_base_alone_has_the_head_of_a_seed(tmp_path: Path) -> None:
    base = run_of(tmp_path, "bert", "SEQ_CLS").base.model
    task = Task("SEQ_CLS", "single_label", ("a", "b"))
    options: dict[str, Any] = {"auto_class": AUTO_CLASSES["SEQ_CLS"], "model_options": task.model_options()}
    heads = []
    for seed, before in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        heads.append(load_base(base, seed=seed, **options).model.classifier.weight)
        assert torch.equal(torch.get_rng_state(), state)
    heads += [api.open_model(BaseSettings(model=base, dtype="fp32"), task=task, seed=1).model.classifier.weight]
    torch.manual_seed(1)
    heads += [load_base(base, **options).model.classifier.weight]
    assert [torch.equal(head, heads[0]) for head in heads] == [True, True, False, True, True]
