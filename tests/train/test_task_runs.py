"""A complete run of every task on a tiny random base: it learns, writes its figures, and is opened again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.task_runs import run_of
from helpers.tiny_tasks import NOUNS, THINGS, rows_for, save_tiny, write_rows
from lorakeet.api import evaluate_data, generate, open_model, plan_layers, predict
from lorakeet.config import BaseSettings, DataSettings, RunConfig
from lorakeet.errors import AdapterError, BaseModelError, ConfigError
from lorakeet.train.run import run_training

LEARNS = {  # task -> metric and the least value on the held-out part
    "SEQ_CLS": ("accuracy", 0.85),
    "multi_label": ("micro_f1", 0.9),
    "TOKEN_CLS": ("accuracy", 0.95),
    "QUESTION_ANS": ("exact_match", 0.8),
}


def slow(*cases: str) -> list[Any]:
    """Mark cases as slow: those whose siblings run by default."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in sorted(cases)]


def opened_again(config: RunConfig):
    return open_model(BaseSettings(model=config.base.model, device="cpu", dtype="fp32"), [f"{config.out}/adapter"])


@pytest.mark.parametrize("rows", ["TOKEN_CLS", *slow(*(set(LEARNS) - {"TOKEN_CLS"}))])
def test_an_encoder_learns_the_task_of_its_data(tmp_path: Path, rows: str) -> None:
    config = run_of(tmp_path, "bert", rows)
    summary = run_training(config)
    figure, least = LEARNS[rows]
    assert summary["after"][figure] >= least > summary["before"][figure], summary["after"]
    assert rows == "TOKEN_CLS" or summary["after"][figure] > summary["baseline"].get(
        figure, 0
    )  # the nouns determine the tag
    assert summary["after"]["loss"] < summary["before"]["loss"]
    # the files alone give the figures of the run
    opened = opened_again(config)
    data = config.data.model_copy(update={"path": str(tmp_path / f"{rows}.jsonl")})
    again = evaluate_data(opened, f"{config.out}/adapter", data, held_out_only=True, batch_size=3)
    assert again == pytest.approx(summary["after"], rel=1e-4)


@pytest.mark.parametrize("rows", ["SEQ_CLS", *slow("TOKEN_CLS", "QUESTION_ANS"), "FEATURE_EXTRACTION"])
def test_accumulation_does_not_change_the_losses(tmp_path: Path, rows: str) -> None:
    """Whether a model divides by the step's targets is checked for all tasks, also where labels are not tokens."""
    sizes = ((8, 1), (4, 2)) if rows != "FEATURE_EXTRACTION" else ((4, 2),)  # other negatives: another loss
    after = []
    for batch, accumulated in sizes:
        folder = tmp_path / f"{batch}"
        folder.mkdir()
        settings = {"train__batch_size": batch, "train__grad_accum": accumulated, "train__steps": 3}
        after.append(run_training(run_of(folder, "bert", rows, **settings))["after"]["loss"])
    assert after[0] == pytest.approx(after[-1], abs=2e-5)


def test_a_classifier_predicts_class_names(tmp_path: Path) -> None:
    config = run_of(tmp_path, "bert", "SEQ_CLS")
    summary = run_training(config)
    assert summary["task"] == {"type": "SEQ_CLS", "problem": "single_label", "labels": sorted(THINGS)}
    assert (tmp_path / "run" / "confusion.png").stat().st_size > 5000
    notes = json.loads((tmp_path / "run" / "adapter" / "lorakeet.json").read_text())
    assert notes["task"] == summary["task"]
    adapter = f"{config.out}/adapter"
    opened = opened_again(config)
    said = predict(opened, adapter, ["we found the owl near a house", "the soup was good"])
    assert [answer["label"] for answer in said] == ["bird", "food"]
    assert sum(said[0]["scores"].values()) == pytest.approx(1)


def test_a_tagger_tags_words(tmp_path: Path) -> None:
    config = run_of(tmp_path, "bert", "TOKEN_CLS")
    run_training(config)
    words = predict(opened_again(config), f"{config.out}/adapter", ["we found the saw today"])[0]["words"]
    assert [(word["word"], word["tag"]) for word in words] == [
        *(("we", "O"), ("found", "O"), ("the", "O"), ("saw", "B-tool"), ("today", "O"))
    ]


def test_an_answer_is_found_in_its_text(tmp_path: Path) -> None:
    config = run_of(tmp_path, "bert", "QUESTION_ANS")
    run_training(config)
    row = {"question": "found", "context": "the old hammer was seen"}
    said = predict(opened_again(config), f"{config.out}/adapter", [row])[0]
    assert said["answer"] == "hammer" and row["context"][said["start"] : said["end"]] == "hammer"


def test_pairs_teach_an_encoder_to_embed(tmp_path: Path) -> None:
    config = run_of(tmp_path, "bert", "FEATURE_EXTRACTION", train__steps=30)
    summary = run_training(config)
    assert summary["after"]["mrr"] > summary["before"]["mrr"]
    vectors = predict(opened_again(config), f"{config.out}/adapter", ["the owl", "a owl", "the soup was good"])
    a, b, c = (torch.tensor(row["embedding"]) for row in vectors)
    assert float(a.norm()) == pytest.approx(1, abs=1e-5) and a @ b > a @ c


def test_masked_tokens_are_predicted(tmp_path: Path) -> None:
    config = run_of(tmp_path, "bert", "MASKED_LM", train__steps=30, task__type="MASKED_LM")
    summary = run_training(config)
    assert summary["after"]["loss"] < summary["before"]["loss"] and summary["after"]["perplexity"] > 1
    said = predict(opened_again(config), f"{config.out}/adapter", ["the <mask> was seen"])[0]
    assert len(said["fillings"]) == 5 and "<mask>" not in said["fillings"][0]["text"]
    config_file = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config_file["task_type"] is None


def test_a_regression_gives_a_value(tmp_path: Path) -> None:
    config = run_of(tmp_path, "bert", "regression")
    summary = run_training(config)
    assert summary["after"]["mse"] < 0.4 < summary["baseline"]["mse"]
    said = predict(opened_again(config), f"{config.out}/adapter", ["the crow was seen", "we found the bread"])
    assert said[0]["value"] + 1 < said[1]["value"]


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_a_sequence_to_sequence_model_generates(tmp_path: Path, kind: str) -> None:
    config = run_of(tmp_path, kind, "SEQ_2_SEQ_LM", train__steps=150, lora__r=32, lora__lora_alpha=32)
    summary = run_training(config)
    assert summary["task"]["type"] == "SEQ_2_SEQ_LM"
    assert summary["after"]["exact_match"] > 0.8 > summary["before"]["exact_match"]
    text = generate(opened_again(config), f"{config.out}/adapter", ["we found the owl near a house"], greedy=True)
    assert text[0].strip() in NOUNS


def test_a_decoder_can_be_a_classifier(tmp_path: Path) -> None:
    config = run_of(tmp_path, "llama", "SEQ_CLS", task__type="SEQ_CLS", train__seed=3)
    summary = run_training(config)
    assert summary["after"]["accuracy"] > 0.9
    assert predict(opened_again(config), f"{config.out}/adapter", ["the soup was good"])[0]["label"] == "food"


def test_predict_refuses_a_generative_model(tmp_path: Path) -> None:
    opened = open_model(BaseSettings(model=str(save_tiny(tmp_path / "b", "llama")), device="cpu"))
    with pytest.raises(AdapterError, match="this is a .* model; `predict` needs"):
        predict(opened, None, ["the owl"])


def test_a_task_that_the_base_cannot_do_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = run_of(tmp_path, "llama", "MASKED_LM", task__type="MASKED_LM")
    with pytest.raises(BaseModelError, match="does not support MASKED_LM, expected CAUSAL_LM, SEQ_CLS"):
        run_training(config)
    assert not (tmp_path / "run").exists()
    config = run_of(tmp_path, "llama", "text", data__stream=True, train__steps=None)
    with pytest.raises(ConfigError, match="the length of a stream is unknown"):
        run_training(config)


def test_planning_needs_no_head(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "b", "bert")
    from lorakeet.config import LoraSettings

    assert plan_layers(str(base), LoraSettings())["summary"].startswith("4 layers (2 query, 2 value)")
    assert "trained whole: classifier" in plan_layers(str(base), LoraSettings(), "SEQ_CLS")["summary"]


def test_evaluating_takes_labels_from_the_adapter(tmp_path: Path) -> None:
    config = run_of(tmp_path, "bert", "SEQ_CLS")
    run_training(config)
    some = [row for row in rows_for("SEQ_CLS") if row["label"] != "bird"]  # a file without one of the classes
    data = DataSettings(path=str(write_rows(tmp_path / "some.jsonl", some)))
    figures = evaluate_data(opened_again(config), f"{config.out}/adapter", data)
    assert figures["accuracy"] > 0.9
