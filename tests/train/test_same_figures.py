"""The held-out figures of a run and of ``lorakeet eval`` on its adapter are equal to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.task_runs import run_of
from lorakeet import api
from lorakeet.api import evaluate_data, open_model
from lorakeet.config import BaseSettings
from lorakeet.patches.padding_free import is_padding_free
from lorakeet.train.run import run_training
from lorakeet.workshop import evaluate as workshop_evaluate

#: Base, rows and settings of a run for each task.
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "CAUSAL_LM": ("llama", "text", {}),
    "CAUSAL_LM in bf16": ("llama", "text", {"base__dtype": "bf16"}),
    "CAUSAL_LM in 8 bits": ("llama", "text", {"base__bits": 8}),
    "SEQ_CLS": ("bert", "SEQ_CLS", {}),
    "multi_label": ("bert", "multi_label", {"task__type": "SEQ_CLS"}),
    "regression": ("bert", "regression", {"task__type": "SEQ_CLS"}),
    "TOKEN_CLS": ("bert", "TOKEN_CLS", {}),
    "MASKED_LM": ("bert", "text", {}),
    "QUESTION_ANS": ("bert", "QUESTION_ANS", {}),
    "FEATURE_EXTRACTION": ("bert", "FEATURE_EXTRACTION", {}),
    "SEQ_2_SEQ_LM": ("t5", "SEQ_2_SEQ_LM", {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_figures_of_a_run_are_those_of_eval(name: str, tmp_path: Path) -> None:
    kind, rows, changes = RUNS[name]
    config = run_of(tmp_path, kind, rows, train__steps=5, train__batch_size=4, **changes)
    summary = run_training(config)
    adapter = str(tmp_path / "run" / "adapter")
    opened = open_model(BaseSettings(**config.base.model_dump()), [adapter])
    random_state = torch.get_rng_state()
    figures = evaluate_data(opened, adapter, config.data, held_out_only=True, batch_size=4)
    assert figures == summary["after"]
    assert figures["loss"] != summary["before"]["loss"]
    assert torch.equal(torch.get_rng_state(), random_state) and not is_padding_free(opened.model)


def test_eval_agrees_with_the_run_where_config_and_tokenizer_do_not(tmp_path: Path) -> None:
    config = run_of(tmp_path, "llama", "SEQ_CLS", train__steps=2, train__batch_size=4, task__type="SEQ_CLS")
    folder = Path(config.base.model)
    for name, change in {"config": {"pad_token_id": 3}, "tokenizer_config": {"pad_token": None}}.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    summary = run_training(config)
    adapter = str(tmp_path / "run" / "adapter")
    opened = open_model(BaseSettings(**config.base.model_dump()), [adapter])
    assert evaluate_data(opened, adapter, config.data, held_out_only=True) == summary["after"]
    texts = ["parrot", "the old green parrot was seen near the house today"]
    alone, together = (api.predict(opened, adapter, texts, batch_size=size) for size in (1, 2))
    assert alone[0]["scores"] == pytest.approx(together[0]["scores"], abs=1e-5)


def test_eval_computes_neither_padding_nor_whole_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(tmp_path, "llama", "text")
    opened = open_model(BaseSettings(**config.base.model_dump()))
    positions: list[tuple[int, ...]] = []
    logits: list[tuple[int, ...]] = []
    layer, head = opened.model.get_submodule("model.layers.0.mlp"), opened.model.get_output_embeddings()
    layer.register_forward_hook(lambda module, args, output: positions.append(tuple(output.shape)))
    head.register_forward_hook(lambda module, args, output: logits.append(tuple(output.shape)))
    rows: list[int] = []
    prepare = workshop_evaluate.prepare

    def noting(*args: Any, **settings: Any) -> Any:
        prepared = prepare(*args, **settings)
        rows.extend(prepared.held_out["length"][:])
        return prepared

    monkeypatch.setattr(workshop_evaluate, "prepare", noting)
    evaluate_data(opened, None, config.data, held_out_only=True)
    assert len(set(rows)) > 1  # so that batches have padding
    assert sum(shape[0] * shape[1] for shape in positions) == sum(rows)
    # rows of targets alone, never [B, T, vocabulary]
    assert logits and all(len(shape) == 2 or shape[-1] != head.out_features for shape in logits)
