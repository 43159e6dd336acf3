"""Adapters with added tokens open on their plain base: the embedding is resized to their file or their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from helpers.tiny import shake
from helpers.tiny_tasks import WORDS, rows_for, save_tiny, write_rows
from lorakeet import LoraConfig, api, get_peft_model
from lorakeet.adapter.vocabulary import fit_vocabulary
from lorakeet.cli import main
from lorakeet.config import BaseSettings
from lorakeet.errors import AdapterError

ROWS = len(WORDS)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base", "llama")


def adapter(base: Path, folder: Path, *, rows: int | None = None, tokens: int = 2, **settings: Any) -> Path:
    """Save an adapter as a script makes it that adds tokens, resizes the base and trains."""
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(tokens)])
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **settings})
    peft = get_peft_model(model, config)
    shake(peft)
    peft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "logits.txt").write_text(str(peft(torch.tensor([[3, 14, ROWS, 5]])).logits.double().sum().item()))
    return folder


WAYS: dict[str, dict[str, Any]] = {
    "resized": {},
    "with spare rows": {"rows": 30},
    "trained rows": {"trainable_token_indices": [ROWS, ROWS + 1]},
    "saved whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def test_a_base_in_8_bits_is_resized_too(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter")
    opened = api.open_model(BaseSettings(model=str(base), bits=8), [str(folder)])
    with torch.no_grad():
        found = opened.model(torch.tensor([[3, 14, ROWS, 5]])).logits.double().sum().item()
    assert found == pytest.approx(float((folder / "logits.txt").read_text()), rel=0.05, abs=2)


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_with_added_tokens_answers_as_where_it_was_made(way: str, base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter", **WAYS[way])
    opened = api.open_model(BaseSettings(model=str(base), dtype="fp32"), [str(folder)])
    with torch.no_grad(), opened.answering(str(folder)):
        found = opened.model(torch.tensor([[3, 14, ROWS, 5]])).logits.double().sum().item()
    assert found == pytest.approx(float((folder / "logits.txt").read_text()), abs=1e-3)
    assert len(opened.base.tokenizer) == ROWS + 2
    assert not any(p.requires_grad for p in opened.model.parameters())


@pytest.mark.parametrize("words", [["generate", "--prompt", "the <new0>", "--greedy"], ["eval", "--data", "t.jsonl"]])
def test_commands_open_it(words: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.jsonl", rows_for("CAUSAL_LM", 4))
    adapter(base, tmp_path / "adapter")
    more = ["--max-new-tokens", "2"] if words[0] == "generate" else []
    assert main([*words, *more, "--model", str(base), "--adapter", "adapter", "--dtype", "fp32"]) == 0


def test_a_training_continues_from_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{row['text']} <new0>"} for row in rows_for("CAUSAL_LM", 8)]
    write_rows(tmp_path / "t.jsonl", rows)
    adapter(base, tmp_path / "adapter")
    words = ["train", "--model", str(base), "--init-adapter", "adapter", "--data", "t.jsonl", "--out", "run"]
    assert main([*words, "--steps", "1", "--dtype", "fp32", "--eval-fraction", "0"]) == 0
    assert main(["eval", "--model", str(base), "--adapter", "run/adapter", "--data", "t.jsonl", "--dtype", "fp32"]) == 0


def test_rows_that_were_not_saved_are_random_by_seed_and_said(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lora_" in key}, file, {"format": "pt"})
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(rows))
        opened = api.open_model(BaseSettings(model=str(base), dtype="fp32"), [str(folder)], seed=seed)
        rows.append(opened.model.get_input_embeddings().weight[ROWS:].clone())
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_adapters_of_different_sizes_are_refused(base: Path, tmp_path: Path) -> None:
    folders = [adapter(base, tmp_path / str(tokens), tokens=tokens) for tokens in (1, 2)]
    with pytest.raises(AdapterError, match="different sizes"):
        api.open_model(BaseSettings(model=str(base), dtype="fp32"), list(map(str, folders)))


def test_a_token_without_row_that_is_the_bases_own_stays_without_one(base: Path, tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tokenizer.add_tokens(["<own>"])
    plain = tf.AutoModelForCausalLM.from_pretrained(base)
    fit_vocabulary(plain, tokenizer, tokenizer, [str(tmp_path / "adapter")])
    assert plain.get_input_embeddings().weight.shape[0] == ROWS
