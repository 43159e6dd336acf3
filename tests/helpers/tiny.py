"""Tiny random models, one for each compared architecture."""

from __future__ import annotations

import torch
import transformers as tf

_SMALL = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def _llama() -> tf.PreTrainedModel:
    config = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **_SMALL,
    )
    return tf.LlamaForCausalLM(config)


def _opt() -> tf.PreTrainedModel:
    config = tf.OPTConfig(
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=24,
        max_position_embeddings=64,
        **_SMALL,
    )
    return tf.OPTForCausalLM(config)


def _gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **_SMALL))


def _bloom() -> tf.PreTrainedModel:
    return tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **_SMALL))


def _bert() -> tf.PreTrainedModel:
    config = tf.BertConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=5,
        **_SMALL,
    )
    return tf.BertForSequenceClassification(config)


ARCHITECTURES = {"llama": _llama, "opt": _opt, "gpt2": _gpt2, "bloom": _bloom, "bert": _bert}
LINEARS = {  # for each: two types of attention layers, and one of the feed-forward network
    "llama": ["q_proj", "v_proj", "down_proj"],
    "opt": ["q_proj", "v_proj", "fc1"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h"],
    "bert": ["query", "value", "intermediate.dense"],
}
EMBEDDING = {
    "llama": "embed_tokens",
    "opt": "embed_tokens",
    "gpt2": "wte",
    "bloom": "word_embeddings",
    "bert": "word_embeddings",
}
TASK = {name: "SEQ_CLS" if name == "bert" else "CAUSAL_LM" for name in ARCHITECTURES}


def make(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """Build a random model in eval mode; the same name and seed give the same weights."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide errors
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def token_ids(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Draw random token ids without padding."""
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def shake(model: torch.nn.Module, adapter: str = "default", seed: int = 3) -> None:
    """Give an adapter random weights, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and f".{adapter}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif parameter.requires_grad and ".lora_" not in name:  # biases, fully trained modules
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
