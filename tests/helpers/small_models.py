"""Small random models of many architectures, batches of uneven length, and comparison of outputs and gradients."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from helpers.tiny import shake
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.lora.config import LoraConfig

LENGTHS = [9, 1, 4, 12, 4, 7]


ROWS, COLUMNS, TOTAL = len(LENGTHS), max(LENGTHS), sum(LENGTHS)


WINDOW = 4  # where an architecture has one: shorter than most samples


_SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "dropout": 0.0,
}


_GROUPED = {"num_key_value_heads": 2}


_HEADS = {**_GROUPED, "head_dim": 8}


_EXPERTS = {**_GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


#: Settings of an architecture's small model, in addition to the common ones.
_SPECIAL: dict[str, dict[str, Any]] = {
    "cohere": _GROUPED,
    "cohere2": _GROUPED | _WINDOWS,
    "distilbert": {"hidden_dim": 40},
    "electra": {"embedding_size": 24},
    "eurobert": _GROUPED,
    "gemma": _HEADS,
    "gemma2": _HEADS | _WINDOWS | {"attn_logit_softcapping": 1.5},
    "gemma3_text": _HEADS | _WINDOWS,
    "glm": _HEADS,
    "glm4": _HEADS,
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "granite": _GROUPED | {"attention_multiplier": 0.3},
    "helium": _HEADS,
    "llama": _GROUPED,
    "ministral": _HEADS | _WINDOWS,
    "mistral": _GROUPED | {"sliding_window": WINDOW},
    "mixtral": _EXPERTS | {"sliding_window": WINDOW},
    "modernbert": {"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2},
    "nemotron": _HEADS,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmo3": _GROUPED | _WINDOWS,
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24, "layerdrop": 0.0},
    "phi": _GROUPED,
    "phi3": _GROUPED | {"sliding_window": WINDOW},
    "qwen2": _GROUPED | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3": _HEADS,
    "qwen3_moe": _EXPERTS | {"head_dim": 8},
    "smollm3": _GROUPED | {"no_rope_layer_interval": 2},
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED | {"sliding_window": WINDOW},
}


def small(kind: str, head: str = "lm", attention: str | None = None, **changes: Any) -> tf.PreTrainedModel:
    """Build a random model of an architecture, with its language-modeling head or as a classifier."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**_SMALL, **_SPECIAL.get(kind, {}), **changes})
    attention = attention or ("eager" if kind == "gemma2" else "sdpa")
    if head == "lm":
        heads = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MASKED_LM_MAPPING_NAMES}
        model = getattr(tf, heads[kind])._from_config(config, attn_implementation=attention)
    else:
        model = tf.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide errors
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def adapted(model: tf.PreTrainedModel, **settings: Any) -> nn.Module:
    """Add an adapter on every linear layer, and make the embeddings trainable."""
    made = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **settings))
    shake(made)
    model.get_input_embeddings().weight.requires_grad_(True)
    return made


def ragged(left: bool = False, lengths: list[int] = LENGTHS, seed: int = 1) -> dict[str, Tensor]:
    """Draw random ids and their attention mask; padding has random ids too."""
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    ids = torch.randint(2, 61, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.long()}


def outcome(model: nn.Module, batch: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """Return the logits at real positions and all gradients of trainable parameters."""
    model.zero_grad()
    logits = model(**batch, **settings).logits
    if logits.ndim == 3:
        logits = logits[batch["attention_mask"].bool()]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    learned = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(learned) > 2
    return {"logits": logits.detach(), **learned}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=tolerance,
            atol=tolerance * (1 + 3 * float(value.abs().max())),
            msg=lambda m, n=name: f"{n}: {m}",
        )


KINDS = [
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
]  # fmt: skip
