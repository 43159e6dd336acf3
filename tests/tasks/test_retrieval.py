"""Repeated positives are no wrong answers, and the held-out loss of pairs does not depend on the batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from helpers.task_runs import run_of
from helpers.tiny_tasks import rows_for, write_rows
from lorakeet.api import evaluate_data, open_model
from lorakeet.tasks.retrieval import CandidateTexts, pair_loss, retrieval, summed_pair_loss
from lorakeet.tasks.task import Task


def test_a_repeated_positive_is_no_wrong_answer() -> None:
    texts = CandidateTexts(["a", "b", "a", "c"], ["p", "p", "q", "r", "s"])
    assert texts.places == [0, 2, 3, 4] and texts.own == [0, 0, 1, 2]
    assert texts.also_right(0, 4).tolist() == [
        [False, True, False, False],  # the positive of the same anchor in another row
        [False, False, False, False],
        [True, False, False, False],
        [False, False, False, False],
    ]
    assert CandidateTexts(["a", "b"], ["b", "a"]).also_right(0, 2).tolist() == [[False, True], [True, False]]


def test_the_loss_leaves_right_answers_out() -> None:
    torch.manual_seed(0)
    a, p = (normalize(torch.randn(4, 7), dim=-1) for _ in range(2))
    p[1] = p[0]
    texts = CandidateTexts("abad", "ppqr")
    scores = 20 * a @ p.T
    by_hand = [
        scores[0, [0, 3]].logsumexp(0) - scores[0, 0],
        scores[1, [1, 2, 3]].logsumexp(0) - scores[1, 1],
        scores[2, [2, 3]].logsumexp(0) - scores[2, 2],
        scores[3, [0, 2, 3]].logsumexp(0) - scores[3, 3],
    ]
    assert float(pair_loss(a, p, texts=texts)) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-5)
    assert summed_pair_loss(a.numpy(), p.numpy(), texts) == pytest.approx(float(torch.stack(by_hand).sum()), rel=1e-5)


def test_few_distinct_positives_are_found() -> None:
    positives = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    assert retrieval(positives, positives, CandidateTexts("abcdef", "pqrpqr")) == {"accuracy_at_1": 1.0, "mrr": 1.0}
    assert retrieval(positives, positives)["accuracy_at_1"] == 0.5


def test_the_held_out_loss_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    config = run_of(tmp_path, "bert", "FEATURE_EXTRACTION")
    few = [{**row, "positive": row["positive"].split()[-1]} for row in rows_for("FEATURE_EXTRACTION", 40)]
    data = config.data.model_copy(update={"path": str(write_rows(tmp_path / "few.jsonl", few))})
    opened = open_model(config.base, task=Task("FEATURE_EXTRACTION"))
    losses = [evaluate_data(opened, None, data, batch_size=size) for size in (3, 16)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
