"""Losses that a task computes itself, and the notes that a task is restored from."""

from __future__ import annotations

import pytest
import torch

from lorakeet.tasks.retrieval import pair_loss
from lorakeet.tasks.task import Task


def test_the_loss_of_pairs_is_that_of_its_equation() -> None:
    torch.manual_seed(0)
    a, p, n = (torch.nn.functional.normalize(torch.randn(5, 7), dim=-1) for _ in range(3))
    scores = 20 * torch.cat([a @ p.T, a @ n.T], dim=1)
    by_hand = torch.stack([scores[i].logsumexp(0) - scores[i, i] for i in range(5)]).mean()
    assert float(pair_loss(a, p, n)) == pytest.approx(float(by_hand), rel=1e-5)


def test_a_task_is_restored_from_its_notes() -> None:
    for task in (Task(), Task("SEQ_CLS", "multi_label", ("a", "b")), Task("MASKED_LM")):
        assert Task.from_notes(task.notes()) == task
    assert Task("SEQ_CLS", "single_label", ("a", "b")).model_options()["id2label"] == {0: "a", 1: "b"}
