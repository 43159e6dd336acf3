"""Folder that the documentation assumes: a base model, quotations, a finished run.

The base is at the default model's public name, taken as a relative path. So code and commands of the documentation run
there unchanged, without a network and in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny_training import tiny_llama
from lorakeet.cli import main
from lorakeet.config import DEFAULT_MODEL

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # as in the real one: unknown, start, end and padding
QUOTATIONS = [
    ("Two things are infinite: the universe and human stupidity.", "Einstein"),
    ("I can resist everything except temptation.", "Wilde"),
    ("The trouble with computers is that they do what you tell them.", None),
    ("Beware of the dog.", None),
    ("Love is blind, but the neighbours are not.", None),
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each byte; the end token pads."""
    vocabulary = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    unknown, start, end = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=start, eos_token=end, pad_token=end
    )


def save_base(folder: Path) -> Path:
    """Save a tiny random Llama and its tokenizer with ``save_pretrained``."""
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def furnish(folder: Path) -> Path:
    """Write the default model, ``fortunes`` and ``quotes.jsonl`` into ``folder``."""
    save_base(folder / DEFAULT_MODEL)
    texts = [(f"{text} ({number})", author) for number in range(8) for text, author in QUOTATIONS]
    fortunes = "\n%\n".join(text + (f"\n\t\t-- {author}" if author else "") for text, author in texts)
    (folder / "fortunes").write_text(fortunes + "\n%\n", encoding="utf-8")
    rows = [json.dumps({"quote": text, "author": author}) for text, author in texts]
    (folder / "quotes.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def finish_a_run() -> None:
    """Train ``my-run`` in the current folder."""
    words = ["train", "--data", "quotes.jsonl", "--out", "my-run", "--steps", "5", "--lr", "0.05", "--r", "4"]
    assert main([*words, "--batch-size", "2", "--grad-accum", "2", "train.save_every=2"]) == 0
