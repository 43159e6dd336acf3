"""Names inside of transformers that the patches rely on; each test fails by name if a new version changes one.

Seen in transformers 5.18.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.masking_utils import (
    bidirectional_mask_function,
    create_causal_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.llama import modeling_llama

from helpers.small_models import small
from lorakeet.patches import causal_loss, fused_layers, padding_free


def test_the_mask_of_a_sliding_window_is_a_closure_over_its_parts() -> None:
    """``padding_free._overlays`` reads the parts from the closure."""
    causal, both = sliding_window_causal_mask_function(4), sliding_window_bidirectional_mask_function(4)
    assert padding_free._overlays(causal) == {"sliding_window_overlay", "causal_mask_function"}
    assert padding_free._overlays(both) == {"sliding_window_bidirectional_overlay", "bidirectional_mask_function"}


def test_a_mask_function_that_is_unknown_gives_the_plain_mask() -> None:
    assert padding_free._overlays(lambda batch, head, q, kv: q >= kv) == set()
    assert padding_free._pattern(lambda batch, head, q, kv: q >= kv, local_size=4) is None
    assert padding_free._pattern(bidirectional_mask_function) is not None


def test_the_registered_mask_function_is_called_by_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    """``padding_free._packing_or_mask`` takes keywords only, among them sizes and the mask."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(padding_free, "_pattern", lambda **arguments: seen.update(arguments))
    config = small("llama").config
    config._attn_implementation = padding_free._NAMES["sdpa"]
    mask = torch.tensor([[1, 1, 0]])
    create_causal_mask(
        config=config, inputs_embeds=torch.zeros(1, 3, 16), attention_mask=mask, past_key_values=None, position_ids=None
    )
    assert {"batch_size", "q_length", "attention_mask", "mask_function"} <= seen.keys()


@pytest.mark.parametrize("architecture", fused_layers.ROTARY)
def test_every_attention_rotates_by_a_global_function(architecture: str) -> None:
    """``fused_layers`` runs the attention's own code with other globals."""
    file = getattr(
        tf.models, {"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe"}.get(architecture, architecture.lower())
    )
    module = inspect.getmodule(getattr(file, f"{architecture}Config"))
    assert module is not None
    modeling = __import__(module.__name__.replace("configuration_", "modeling_"), fromlist=["_"])
    forward = getattr(modeling, f"{architecture}Attention").forward
    assert "apply_rotary_pos_emb" in forward.__code__.co_names
    assert "apply_rotary_pos_emb" in forward.__globals__


def test_the_forward_of_a_language_model_calls_its_loss_function_by_name() -> None:
    """``causal_loss.calls_loss_function`` reads the call from the source."""
    assert causal_loss._LOSS_CALL in inspect.getsource(inspect.unwrap(modeling_llama.LlamaForCausalLM.forward))
    assert causal_loss.calls_loss_function(small("llama"))
    assert not causal_loss.calls_loss_function(small("bert"))
    assert isinstance(inspect.getattr_static(tf.PreTrainedModel, "loss_function"), property)
