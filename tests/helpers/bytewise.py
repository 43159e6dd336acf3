"""A byte-level tokenizer with a chat template, and the config of a tiny Llama that fits it."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SPECIALS = ("<s>", "</s>")
VOCABULARY = [
    *SPECIALS,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    "he",
    "the",
]  # 260 tokens: one a byte, two merged


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one id for each byte, and for "he" and "the"; with start and end token, no pad token."""
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[("h", "e"), ("t", "he")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def llama_config(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **changes,
    }
    return LlamaConfig(**values)
