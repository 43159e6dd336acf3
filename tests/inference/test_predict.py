"""Predictions read rows as the training does, and decode answers as held-out figures do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from helpers.tiny_tasks import save_tiny
from lorakeet.base.load import load_base
from lorakeet.errors import DataError
from lorakeet.inference.answers import WindowAnswer, best_answers, window_answers
from lorakeet.inference.predict import predict
from lorakeet.inference.questions import canonical_questions, read_questions


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny BERT with 64 positions."""
    return save_tiny(tmp_path_factory.mktemp("bert"), "bert")


def model_for(bert: Path, auto_class: Any, labels: int = 2) -> Any:
    return load_base(str(bert), auto_class=auto_class, device="cpu", dtype="fp32", model_options={"num_labels": labels})


def test_the_best_span_of_a_window_is_that_of_all_spans() -> None:
    torch.manual_seed(3)
    starts, ends = torch.randn(2, 5, 9)
    places = torch.tensor([[-1, 0, 2, 4, 6, 8, -1, -1, -1]]).expand(5, -1)
    batch = {
        "starts": places,
        "ends": places + 1,
        "no_answer": torch.zeros(5, dtype=torch.int64),
        "row": torch.arange(5),
    }
    for window, found in enumerate(window_answers(starts, ends, batch)):
        log = starts[window].log_softmax(-1)[:, None] + ends[window].log_softmax(-1)[None, :]
        spans = {(a, b): float(log[a, b]) for a in range(1, 6) for b in range(a, 6)}
        best = max(spans, key=spans.__getitem__)
        if spans[best] > float(log[0, 0]):
            assert (found.start, found.end) == (int(places[0, best[0]]), int(places[0, best[1]]) + 1)
            assert found.score == pytest.approx(spans[best])
        else:
            assert not found.found and found.score == pytest.approx(float(log[0, 0]))


def test_an_answer_in_any_window_beats_windows_without() -> None:
    none, sure, weak = (
        WindowAnswer(7, 0, 0, -0.1, -0.1),
        WindowAnswer(7, 3, 5, -1.0, -2.0),
        WindowAnswer(7, 8, 9, -3.0, -4.0),
    )
    assert best_answers([none, weak, sure, none]) == {7: sure}
    other = WindowAnswer(2, 0, 0, -0.5, -0.5)
    assert best_answers([none, other, WindowAnswer(2, 0, 0, -0.2, -0.2)]) == {2: other, 7: none}


def test_a_classifier_of_pairs_is_asked_about_both_texts(bert: Path) -> None:
    base = model_for(bert, tf.AutoModelForSequenceClassification)
    rows = [{"text": "the owl", "text_pair": "a house"}, {"text": "the owl", "text_pair": ""}]
    first, second = predict(base.model, base.tokenizer, "SEQ_CLS", rows, pairs=True)
    encoded = base.tokenizer("the owl", "a house", return_tensors="pt")
    with torch.no_grad():
        scores = base.model(**encoded).logits.softmax(-1)[0]
    assert list(first["scores"].values()) == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-6)
    assert first["scores"] != second["scores"]
    for row, pairs in (("the owl", True), ({"text": "the owl", "text_pair": None}, True), (rows[0], False)):
        with pytest.raises(DataError, match="row 1 is"):
            predict(base.model, base.tokenizer, "SEQ_CLS", [row], pairs=pairs)


def test_every_word_between_white_space_has_a_tag(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = model_for(bert, tf.AutoModelForTokenClassification)
    text = "  the owl's\u2028house,  seen " + "today " * 100
    [found] = predict(base.model, base.tokenizer, "TOKEN_CLS", [text])
    assert [word["word"] for word in found["words"]] == text.split()
    assert all(word["tag"] and text[word["start"] : word["end"]] == word["word"] for word in found["words"])
    assert "have more than 64 tokens and are tagged in parts" in caplog.text
    [given] = predict(base.model, base.tokenizer, "TOKEN_CLS", [{"tokens": ["the", "old house"]}])
    assert [(word["word"], word["start"], word["end"]) for word in given["words"]] == [
        ("the", 0, 3),
        ("old house", 4, 13),
    ]


def test_a_text_beyond_the_window_is_said(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = model_for(bert, tf.AutoModelForSequenceClassification)
    long = "the old house " * 40
    cut = predict(base.model, base.tokenizer, "SEQ_CLS", [long, "the owl"], max_length=16)
    assert "1 of 2 texts have more than 16 tokens and are cut" in caplog.text
    short = " ".join(long.split()[:14])
    assert cut[0]["scores"] == pytest.approx(
        predict(base.model, base.tokenizer, "SEQ_CLS", [short])[0]["scores"], abs=1e-6
    )


def test_a_masked_token_beyond_the_window_is_refused(bert: Path) -> None:
    base = model_for(bert, tf.AutoModelForMaskedLM)
    with pytest.raises(DataError, match="the masked token of row 1 is not among its first 64 tokens"):
        predict(base.model, base.tokenizer, "MASKED_LM", ["the old house " * 40 + "<mask>"])
    [found] = predict(base.model, base.tokenizer, "MASKED_LM", ["the <mask> was seen"])
    assert math.isclose(found["fillings"][0]["score"], max(each["score"] for each in found["fillings"]))


def test_texts_of_every_format_are_read_as_in_training(tmp_path: Path) -> None:
    rows = [{"id": "a 1", "body": "one\u2028two", "queue": "x"}, {"id": "a 2", "body": 'three, "four"', "queue": "y"}]
    texts = [row["body"] for row in rows]
    (tmp_path / "t.jsonl").write_text(
        "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n"
    )
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.csv").write_text('id,body,queue\na 1,one\u2028two,x\na 2,"three, ""four""",y\n')
    (tmp_path / "t.txt").write_text("".join(f"{text}\n" for text in texts) + "\n")
    for name in ("t.jsonl", "t.json", "t.csv", "t.txt"):
        assert read_questions(tmp_path / name, "SEQ_CLS", {}, {"text": "body", "label": "queue"}) == texts
    assert read_questions(tmp_path / "t.csv", "SEQ_CLS", {"text": "id"}) == ["a 1", "a 2"]
    assert read_questions(tmp_path / "t.csv", "SEQ_CLS", {}) == texts  # found by its name
    with pytest.raises(DataError, match="has no column 'second'"):
        read_questions(tmp_path / "t.csv", "SEQ_CLS", {"text": "body", "text_pair": "second"})
    (tmp_path / "n.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    with pytest.raises(DataError, match="line 2: no text in column 'text'"):
        read_questions(tmp_path / "n.jsonl", "SEQ_CLS", {})


def test_rows_that_no_task_can_answer_are_listed() -> None:
    with pytest.raises(DataError, match="row 1 is 3, expected text; row 3 is ' ', expected text"):
        canonical_questions("MASKED_LM", [3, "the", " "])  # type: ignore[list-item]
    with pytest.raises(DataError, match="row 1 .* expected question and context"):
        canonical_questions("QUESTION_ANS", ["the"])
    with pytest.raises(DataError, match="row 1"):
        canonical_questions("SEQ_CLS", ["half \ud800"])
    assert canonical_questions("FEATURE_EXTRACTION", [{"text": "a"}, "b"]) == [{"anchor": "a"}, {"anchor": "b"}]
