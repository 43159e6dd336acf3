"""Tiny random models of every family, and data for every task that they can learn in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

THINGS = {"bird": ["parrot", "crow", "owl"], "tool": ["hammer", "saw", "file"], "food": ["bread", "soup", "rice"]}
FILLERS = ["the", "a", "old", "green", "near", "house", "was", "seen", "today", "we", "found", "good"]
NOUNS = [noun for nouns in THINGS.values() for noun in nouns]
SPECIALS = ["<pad>", "</s>", "<unk>", "<s>", "<mask>"]
WORDS = [*SPECIALS, *NOUNS, *FILLERS]


def word_tokenizer(pair: bool = True) -> tf.PreTrainedTokenizerFast:
    """Build a tokenizer with one id for each word; ``pair``: <s> text </s>, as for an encoder, else only </s> follows."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if pair:
        single, both = "<s> $A </s>", "<s> $A </s> $B:1 </s>:1"
    else:
        single, both = "$A </s>", "$A </s> $B </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=both, special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    names = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "mask_token": "<mask>",
    }
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", model_max_length=64, **names
    )


_IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}


def _bert() -> tf.PreTrainedModel:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.BertConfig(
        **size,
        initializer_range=0.2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **_IDS,
    )
    return tf.BertForMaskedLM(config)


def _llama() -> tf.PreTrainedModel:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**size, initializer_range=0.2, max_position_embeddings=64, **_IDS))


def _t5() -> tf.PreTrainedModel:
    size = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(
        tf.T5Config(**size, dropout_rate=0.0, decoder_start_token_id=0, **{**_IDS, "bos_token_id": None})
    )


def _bart() -> tf.PreTrainedModel:
    size = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            **size,
            **heads,
            dropout=0.0,
            init_std=0.2,
            max_position_embeddings=64,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
            **_IDS,
        )
    )


BASES: dict[str, Callable[[], tf.PreTrainedModel]] = {"bert": _bert, "llama": _llama, "t5": _t5, "bart": _bart}


def save_tiny(folder: Path, kind: str) -> Path:
    """Save a random model of this kind and its tokenizer with ``save_pretrained``."""
    tf.set_seed(0)
    BASES[kind]().save_pretrained(folder)
    word_tokenizer(pair=kind in ("bert",)).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write a JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _sentence(i: int, noun: str) -> list[str]:
    """Return the noun among one to seven other words, chosen by the number."""
    chance = random.Random(i)
    before, after = (chance.choices(FILLERS, k=chance.randint(*span)) for span in ((1, 4), (0, 3)))
    return [*before, noun, *after]


def rows_for(task: str, count: int = 180) -> list[dict[str, Any]]:
    """Build learnable rows: class, tags, answer and partner all depend on one noun of the sentence."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        kind = list(THINGS)[i % 3]
        noun = THINGS[kind][(i // 3) % 3]
        words = _sentence(i, noun)
        text = " ".join(words)
        if task == "SEQ_CLS":
            rows.append({"text": text, "label": kind})
        elif task == "multi_label":
            rows.append({"text": text, "labels": [kind] + (["aged"] if "old" in words else [])})
        elif task == "regression":
            rows.append({"text": text, "score": float(list(THINGS).index(kind)) + 0.5})
        elif task == "TOKEN_CLS":
            rows.append({"tokens": words, "tags": ["O" if word != noun else f"B-{kind}" for word in words]})
        elif task == "SEQ_2_SEQ_LM":
            rows.append({"source": text, "target": noun})
        elif task == "QUESTION_ANS":
            answers = {"text": [noun], "answer_start": [text.index(noun)]}
            rows.append({"question": "found", "context": text, "answers": answers})
        elif task == "FEATURE_EXTRACTION":
            rows.append({"anchor": text, "positive": " ".join(_sentence(i + 7, noun))})
        else:
            rows.append({"text": text})
    return rows
