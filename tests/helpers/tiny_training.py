"""A tiny random Llama, a tiny tokenizer and a few sentences: training that takes a second."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.lora.config import LoraConfig

WORDS = [
    "a",
    "bird",
    "sings",
    "the",
    "green",
    "parrot",
    "learns",
    "one",
    "song",
    "and",
    "then",
    "sleeps",
    "on",
    "its",
    "branch",
    "while",
    "rain",
    "falls",
]
PAD, END = 0, 1


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Build a Llama of two layers of width 32; the seed decides the weights."""
    set_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "bos_token_id": None,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**values))


def tiny_peft(dropout: float = 0.1, seed: int = 0, **changes: Any) -> PeftModel:
    """Build the tiny Llama with a trainable adapter of rank 4."""
    model = tiny_llama(seed)
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": dropout,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            **changes,
        }
    )
    return get_peft_model(model, config)


def tiny_data(rows: int = 64, seed: int = 0) -> datasets.Dataset:
    """Draw sentences of 3 to 17 token ids, with the end token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 17, (rows,), generator=generator).tolist()
    ids = [torch.randint(2, 40, (n,), generator=generator).tolist() + [END] for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": ids})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one id for each word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
