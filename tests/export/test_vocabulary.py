"""Vocabularies in GGUF: the rule that splits words by llama.cpp's names, and the scores of SentencePiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from helpers.bytewise import byte_tokenizer
from helpers.consumers import gguf_fields
from helpers.mergeable_tokenizer import byte_level_tokenizer, sentencepiece_tokenizer
from helpers.tiny_tasks import word_tokenizer
from helpers.tiny_training import tiny_llama
from lorakeet.errors import BaseModelError
from lorakeet.export.gguf.files import write_model
from lorakeet.export.gguf.vocabulary import splitting_rule

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> Any:
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), rest])


RULES = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": split(_WORDS + r"|\p{N}{1,3}|" + _REST),
    "qwen2": split(_WORDS + r"|\p{N}|" + _REST),
    None: split(r"\w+"),
}


@pytest.mark.parametrize("name", RULES, ids=str)
def test_the_splitting_rule_is_found_by_the_tokenizer(name: str | None) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = RULES[name]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if name is not None:
        assert splitting_rule(state) == name
        return
    with pytest.raises(BaseModelError, match="no name for the rule"):
        splitting_rule(state)


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_tokens_keep_their_rows_and_types(tmp_path: Path, make: Any) -> None:
    tokenizer = make()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages }}"
    rows = len(tokenizer) + 3
    write_model(tmp_path / "model.gguf", tiny_llama(vocab_size=rows), tokenizer, "Tiny")
    fields = gguf_fields(tmp_path / "model.gguf")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    own = len(tokenizer) - 1
    assert tokens[:own] == tokenizer.convert_ids_to_tokens(list(range(own))) and tokens[own] == "<tool>"
    assert tokens[-3:] == [f"[PAD{n}]" for n in range(rows - 3, rows)] and types[-4:] == [4, 5, 5, 5]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"] == "{{ messages }}" and not fields["tokenizer.ggml.add_bos_token"]
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("the inn in the end", "a they"):
        assert again(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids


def test_scores_fall_in_the_order_of_the_merges(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    write_model(tmp_path / "model.gguf", tiny_llama(vocab_size=len(tokenizer)), tokenizer, "Tiny")
    fields = gguf_fields(tmp_path / "model.gguf")
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    order = ["th", "the", "▁the", "he", "in", "▁a", "z"]
    assert sorted(order, key=lambda token: -scores[token]) == order
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert fields["tokenizer.ggml.token_type"][3] == 6


@pytest.mark.parametrize("make", [word_tokenizer, byte_tokenizer])
def test_another_tokenizer_is_refused(tmp_path: Path, make: Any) -> None:
    with pytest.raises(BaseModelError, match=r"WordLevel|no name for the rule"):
        write_model(tmp_path / "model.gguf", tiny_llama(vocab_size=300), make(), "Tiny")
