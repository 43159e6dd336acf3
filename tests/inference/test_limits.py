"""Texts beyond what a base reads: tokens without a row are refused, long texts are cut or tagged in parts and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from helpers.tiny_tasks import WORDS, save_tiny, word_tokenizer
from lorakeet.base.architectures import AUTO_CLASSES
from lorakeet.base.load import load_base
from lorakeet.errors import DataError
from lorakeet.facts.window import window
from lorakeet.inference.generate import complete
from lorakeet.inference.predict import predict

LONG = " ".join(["the old green house was seen today we found a"] * 8)
SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def roberta(folder: Path) -> Path:
    """Save a RoBERTa with a window of 31 tokens: 34 positions, those up to the padding's are taken."""
    config = tf.RobertaConfig(**SIZE, max_position_embeddings=34, vocab_size=len(WORDS), pad_token_id=2, bos_token_id=3)
    tf.RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.pad_token, tokenizer.model_max_length = "<unk>", int(1e30)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", "QUESTION_ANS", "MASKED_LM"])
def test_a_text_beyond_the_window(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"num_labels": 3} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    model, tokenizer = load_base(str(roberta(tmp_path)), auto_class=AUTO_CLASSES[task], model_options=options, seed=1)
    assert window(model.config) == 31
    row: Any = {"question": "found", "context": LONG} if task == "QUESTION_ANS" else LONG
    if task == "MASKED_LM":
        row = f"<mask> {LONG}"
    [answer] = predict(model, tokenizer, task, [row])
    if task == "TOKEN_CLS":
        assert [word["word"] for word in answer["words"]] == LONG.split()
    assert ("more than 31 tokens" in caplog.text) == (task != "QUESTION_ANS")  # which reads all of it, in windows


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", "QUESTION_ANS"])
def test_a_token_without_row_is_no_index_error(task: str, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(save_tiny(tmp_path, "bert")), auto_class=AUTO_CLASSES[task])
    tokenizer.add_tokens(["<extra>"])
    texts = ["the old parrot", "the <extra>"]
    rows: Any = [{"question": "found", "context": text} for text in texts] if task == "QUESTION_ANS" else texts
    with pytest.raises(DataError, match="row 2: the token '<extra>'"):
        predict(model, tokenizer, task, rows)


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_generation_refuses_a_token_without_row_and_text_without_tokens(kind: str, tmp_path: Path) -> None:
    task = "CAUSAL_LM" if kind == "llama" else "SEQ_2_SEQ_LM"
    model, tokenizer = load_base(str(save_tiny(tmp_path, kind)), auto_class=AUTO_CLASSES[task])
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(DataError, match="prompt 2 has the token '<extra>'"):
        complete(model, tokenizer, ["the parrot", "the <extra>"])
    if kind == "llama":
        with pytest.raises(DataError, match="prompt 1 has no token"):
            complete(model, tokenizer, [" "])
    if kind == "bart":  # the decoder has a window of its own
        assert complete(model, tokenizer, ["the parrot"], max_new_tokens=200, greedy=True)
        with pytest.raises(DataError, match="window of 64"):
            complete(model, tokenizer, [LONG])
