"""Tiny random models of every architecture with known default layers, built from its config class."""

from __future__ import annotations

import torch
import transformers as tf
from transformers import PretrainedConfig, PreTrainedModel

_TOKENS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_LONG = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
_KV = {"num_key_value_heads": 1}
_EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
_POSITIONS = {"max_position_embeddings": 40}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}

#: model_type -> sizes that make it tiny
SIZES: dict[str, dict] = {
    "llama": _LONG | _KV,
    "mistral": _LONG | _KV,
    "mixtral": _LONG | _KV | {"num_local_experts": 4},
    "qwen2": _LONG | _KV,
    "qwen3": _LONG | _KV | {"head_dim": 8},
    "qwen2_moe": _LONG | _KV | _EXPERTS | {"shared_expert_intermediate_size": 12},
    "qwen3_moe": _LONG | _KV | _EXPERTS | {"head_dim": 8},
    "gemma2": _LONG | _KV | {"head_dim": 8},
    "gemma3_text": _LONG | _KV | {"head_dim": 8},
    "phi": _LONG | {"partial_rotary_factor": 0.5},
    "phi3": _LONG,
    "opt": _LONG | _POSITIONS | {"ffn_dim": 20, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
    "gpt_neox": _LONG,
    "falcon": _LONG | {"multi_query": True},
    "bert": _LONG | _POSITIONS,
    "roberta": _LONG | _POSITIONS,
    "xlm-roberta": _LONG | _POSITIONS,
    "distilbert": {"dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 2} | _POSITIONS,
    "mpnet": _LONG | _POSITIONS,
    "albert": _LONG | _POSITIONS | {"embedding_size": 8},
    "deberta": _LONG | _POSITIONS,
    "deberta-v2": _LONG | _POSITIONS,
    "modernbert": _LONG | _POSITIONS | {"cls_token_id": 0, "sep_token_id": 1},
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART | _POSITIONS,
    "mbart": _BART | _POSITIONS,
    "marian": _BART | _POSITIONS,
    "pegasus": _BART | _POSITIONS,
}


def tiny_config(kind: str, **more: object) -> PretrainedConfig:
    """Return a small config of the architecture ``kind``."""
    return tf.AutoConfig.for_model(kind, **(_TOKENS | SIZES[kind] | {"num_labels": 3} | more))


def build(auto: type, kind: str, seed: int = 0, **more: object) -> PreTrainedModel:
    """Build a random model of ``kind`` for the task of the auto class, in eval mode; the seed decides the weights."""
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(kind, **more), attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide errors
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
