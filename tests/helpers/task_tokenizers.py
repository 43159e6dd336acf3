"""Small tokenizers in the manner of BERT, of sentencepiece and of byte-level BPE, and rows to encode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorakeet.data.read.record import Location, Locations
from lorakeet.data.rows.kinds import Layout
from lorakeet.data.rows.load import Rows

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = ["the", "bird", "##s", "sing", "##ing", "un", "##believ", "##able", "world", "don", "hanoi", "where", "who"]


def wordpiece_tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """As BERT's: lower case, pieces of words, [CLS] text [SEP] pair [SEP]. ``names``: other special tokens."""
    vocabulary = [*SPECIALS, *PIECES, *LETTERS, *(f"##{letter}" for letter in LETTERS), *"',.?!"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    usual = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    settings: dict[str, Any] = {**usual, **names, "model_input_names": inputs, "name_or_path": "a-model"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def piece_tokenizer(legacy: bool = False) -> PreTrainedTokenizerFast:
    """As sentencepiece's: a space is a part of the word behind it, and one is put before every text."""
    words = [
        "\u2581",
        "\u2581the",
        "\u2581bird",
        "bird",
        "s",
        "\u2581sing",
        "sing",
        "\n",
        *LETTERS,
        "?",
        ":",
        "\u2581a",
    ]
    vocabulary = [
        ("<unk>", -20.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((word, -float(len(words) - i)) for i, word in enumerate(dict.fromkeys(words))),
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def bpe_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes and a few pairs of them, words with the space before them; ``options`` of the pre-tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "b"), ("a", "b"), ("i", "r"), ("Ġb", "ir"), ("Ċ", "Ċ"), ("o", "n")]
    vocabulary = ["<|end|>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", name_or_path="a-model"
    )


def layout(kind: str, *columns: str) -> Layout:
    """A layout whose columns have the names of their roles."""
    return Layout(kind, {name: name for name in columns})


def canonical_rows(features: Mapping[str, Any] | None = None, **columns: list[Any]) -> datasets.Dataset:
    """Rows of canonical columns."""
    data = datasets.Dataset.from_dict(columns)
    return data if features is None else data.cast(datasets.Features({**data.features, **features}))


def locations(count: int) -> Locations:
    """The locations of so many lines of a file."""
    return Locations(Location("a.jsonl", number) for number in range(1, count + 1))


def located_rows(kind: str, **columns: list[Any]) -> Rows:
    """Rows of a kind, whose columns have the names of their roles, with their locations."""
    data = canonical_rows(**columns)
    return Rows(data, locations(len(data)), layout(kind, *columns), "a.jsonl")
