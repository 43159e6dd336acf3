"""Facts about bases: padding, window, rows of the embedding; and that no other module reads them by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import lorakeet
from helpers.tiny_tasks import WORDS, save_tiny, word_tokenizer
from lorakeet.base.load import load_base
from lorakeet.errors import DataError
from lorakeet.facts.padding import agree_on_special_tokens, padding_token
from lorakeet.facts.vocabulary import check_token_ids, embedding_rows, tokens_without_row, vocabulary_size
from lorakeet.facts.window import longest_text, window

SOURCES = Path(lorakeet.__file__).parent
#: Fields of configurations and tokenizers that only the room facts reads.
FIELDS = {"pad_token_id", "max_position_embeddings", "model_max_length", "vocab_size", "torch_dtype", "n_positions"}
#: Uses that are none of a base's: a tokenizer after agree_on_special_tokens, and names of parameters.
OWN = {
    *("data/collate.py", "patches/fused_loss.py", "inference/generate.py"),
    *("export/gguf/architecture.py", "export/gguf/vocabulary.py"),  # fields of a file, as they are
    "serve/http/grammar.py",  # the vocabulary of llguidance
}


def fields_read(source: str) -> Iterator[str]:
    """Yield each of FIELDS that a module reads as an attribute, by getattr or from a mapping."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in FIELDS:
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id == "self"):
                yield node.attr
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if called in ("getattr", "get"):
                yield from (text for text in texts if text in FIELDS)


def test_no_other_module_reads_a_fact_by_itself() -> None:
    paths = {path.relative_to(SOURCES).as_posix(): path for path in SOURCES.rglob("*.py")}
    found = {name: sorted(fields_read(path.read_text(encoding="utf-8"))) for name, path in paths.items()}
    readers = {name for name, fields in found.items() if fields}
    assert {"facts/padding.py", "facts/vocabulary.py", "facts/window.py"} < readers
    assert {name for name in readers if not name.startswith("facts/")} <= OWN


def llama(pad: Any, **more: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(vocab_size=len(WORDS), pad_token_id=pad, **more)


@pytest.mark.parametrize(
    ("stated", "own", "chosen"),
    [
        (0, "<pad>", 0),  # both agree
        (0, "</s>", 0),  # they differ: the config's
        (3, None, 3),  # the config's, though the tokenizer has none
        (7, "<pad>", 0),  # an ordinary word pads nothing
        (-1, None, 1),  # as LLaMA 1 states it
        (99, None, 1),  # no row
        (None, "<mask>", 4),  # the tokenizer's
        (None, None, 1),  # the end token
    ],
)
def test_padding_token_of_config_and_tokenizer(stated: int | None, own: str | None, chosen: int) -> None:
    tokenizer, config = word_tokenizer(), llama(None)
    config.pad_token_id, tokenizer.pad_token = stated, own
    generation = tf.GenerationConfig(pad_token_id=2)
    agree_on_special_tokens(tokenizer, config, generation)
    agreed = (tokenizer.pad_token_id, config.pad_token_id, generation.pad_token_id, padding_token(config, tokenizer))
    assert agreed == (chosen,) * 4


def test_padding_token_beyond_the_rows_is_not_chosen() -> None:
    tokenizer, config = word_tokenizer(), llama(None)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert padding_token(config, tokenizer) == tokenizer.eos_token_id


def test_a_tokenizer_without_end_token_has_the_configs() -> None:
    for stated in (1, [1, 3]):
        tokenizer, config = word_tokenizer(), llama(0)
        tokenizer.eos_token, config.eos_token_id = None, stated
        agree_on_special_tokens(tokenizer, config)
        assert tokenizer.eos_token == "</s>"


def test_a_multimodal_config_has_the_padding_of_its_text() -> None:
    config = tf.LlavaConfig(text_config=llama(None))
    agree_on_special_tokens(tokenizer := word_tokenizer(), config)
    assert config.get_text_config().pad_token_id == tokenizer.pad_token_id == 0


@pytest.mark.parametrize("pad", [0, -1, 3, None])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_text_alone_and_beside_a_longer_one(kind: str, pad: int | None, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, kind)
    config = tf.AutoConfig.from_pretrained(folder)
    if kind == "llama":
        config.pad_token_id = pad
        config.save_pretrained(folder)
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
    options = {"auto_class": tf.AutoModelForSequenceClassification, "model_options": {"num_labels": 3}}
    model, tokenizer = load_base(str(folder), seed=1, **options)
    texts = ["parrot", "the old green parrot was seen near the house today"]
    alone, both = (tokenizer(part, padding=True, return_tensors="pt") for part in (texts[:1], texts))
    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in (alone, both)]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs[0]).logits[0], model(**inputs[1]).logits[0], atol=1e-5, rtol=0)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (tf.RobertaConfig(max_position_embeddings=34, pad_token_id=1, **SMALL), 32),
        (tf.RobertaConfig(max_position_embeddings=34, pad_token_id=0, **SMALL), 33),
        (tf.XLMRobertaConfig(max_position_embeddings=514, pad_token_id=1, **SMALL), 512),
        (tf.MPNetConfig(max_position_embeddings=514, pad_token_id=1, **SMALL), 512),
        (tf.CamembertConfig(max_position_embeddings=514, pad_token_id=1, **SMALL), 512),
        (tf.LongformerConfig(max_position_embeddings=4098, pad_token_id=1, attention_window=[4, 4], **SMALL), 4096),
        (tf.IBertConfig(max_position_embeddings=514, pad_token_id=1, **SMALL), 512),
        (tf.BertConfig(max_position_embeddings=34, pad_token_id=0, **SMALL), 34),
        (tf.BartConfig(max_position_embeddings=64), 64),
        (tf.OPTConfig(max_position_embeddings=64), 64),
        (tf.GPT2Config(n_positions=64), 64),
        (tf.MistralConfig(max_position_embeddings=64, sliding_window=8), 64),
        (tf.LEDConfig(max_encoder_position_embeddings=64), 64),
        (tf.T5Config(), None),
        (tf.BloomConfig(), None),
        (tf.FalconConfig(alibi=True), None),
        (tf.DebertaV2Config(position_biased_input=False, **SMALL), None),
        (tf.XLNetConfig(), None),
        (tf.LlavaConfig(text_config=llama(None, max_position_embeddings=64)), 64),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_window(config: Any, tokens: int | None) -> None:
    assert window(config) == tokens


@pytest.mark.parametrize("kind", [tf.RobertaModel, tf.MPNetModel, tf.BertModel])
def test_a_text_as_long_as_the_window_is_read_and_a_longer_one_is_not(kind: Any) -> None:
    model = kind(kind.config_class(vocab_size=20, max_position_embeddings=12, pad_token_id=1, **SMALL))
    tokens = window(model.config)
    assert tokens is not None
    model(torch.full((1, tokens), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, tokens + 1), 5))


@pytest.mark.parametrize(("limit", "longest"), [(32, 32), (10**30, 64), (2**31 - 1, 64), (512, 64), (0, 64)])
def test_limits_of_tokenizers(limit: int, longest: int) -> None:
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = limit
    assert longest_text(llama(None, max_position_embeddings=64), tokenizer) == longest
    assert longest_text(tf.T5Config(), tokenizer) == (limit if limit in (32, 512) else None)


def test_rows_of_the_embedding() -> None:
    model, tokenizer = tf.LlamaForCausalLM(llama(None, **SMALL)), word_tokenizer()
    assert embedding_rows(model) == vocabulary_size(model.config) == vocabulary_size({"vocab_size": 26}) == len(WORDS)
    assert embedding_rows(torch.nn.Linear(2, 2)) is None
    assert not tokens_without_row(tokenizer, len(WORDS)) and not tokens_without_row(tokenizer, None)
    tokenizer.add_tokens(["<extra>"])
    assert tokens_without_row(tokenizer, len(WORDS)) == {len(WORDS): "<extra>"}
    check_token_ids(tokenizer("the parrot")["input_ids"], tokenizer, len(WORDS), "a text")
    with pytest.raises(DataError, match="a text has the token '<extra>'"):
        check_token_ids(tokenizer("the <extra>")["input_ids"], tokenizer, len(WORDS), "a text")
