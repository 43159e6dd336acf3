"""Architectures in GGUF: names of the tensors, the order of their rows, and the keys that describe the model.

llama.cpp rotates queries and keys of the Llama architecture by neighbouring pairs of rows, transformers by the two halves of
a head. So the rows of these matrices change places. Gemma's norms have weights 1 + w here and w there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import torch
from torch import Tensor

from lorakeet.errors import BaseModelError

#: Ends of the names whose rows are permuted, and the setting that has the number of heads.
_PERMUTED = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
#: Hint of every refusal here.
HINT = "export the merged model: --for merged"


@dataclass(frozen=True)
class Architecture:
    """The form of one architecture in GGUF.

    Attributes:
        name: llama.cpp's name.
        permutes: Whether the rows of queries and keys are stored in another order.
        norm_shift: Number to add to the weights of norms.
        own_head: Whether llama.cpp reads a head beside the embedding.
        activations: The activation functions that llama.cpp computes.
    """

    name: str
    permutes: bool = False
    norm_shift: float = 0.0
    own_head: bool = True
    activations: tuple[str, ...] = ("silu",)


_GELU = ("gelu_pytorch_tanh", "gelu_tanh", "gelu")
#: ``model_type`` of transformers -> its form in GGUF.
ARCHITECTURES = {
    "llama": Architecture("llama", permutes=True),
    "mistral": Architecture("llama", permutes=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_shift=1.0, own_head=False, activations=_GELU),
    "gemma2": Architecture("gemma2", norm_shift=1.0, own_head=False, activations=_GELU),
}


@dataclass(frozen=True)
class TensorLayout:
    """The tensors of one model in GGUF.

    Attributes:
        config: The model's configuration.
        architecture: Its form in GGUF.
    """

    config: Any
    architecture: Architecture

    @cached_property
    def _names(self) -> Any:
        known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(known[self.architecture.name], self.config.num_hidden_layers)

    def name(self, key: str) -> str | None:
        """Return the name in GGUF of a tensor of the state dict; None if GGUF has no such tensor."""
        found: str | None = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        return found

    def rows(self, key: str, tensor: Tensor) -> Tensor:
        """Return the weight, the bias or the B of a layer with its rows in the order of GGUF."""
        heads = next((s for end, s in _PERMUTED.items() if key.rpartition(".")[0].endswith(end)), None)
        if heads is None or not self.architecture.permutes:
            return tensor
        count = getattr(self.config, heads, None) or self.config.num_attention_heads
        return tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)

    def tensors(self, state: dict[str, Tensor], tied: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value in GGUF of each tensor of a model.

        Args:
            state: The model's state dict.
            tied: Whether the head is the embedding.

        Raises:
            BaseModelError: GGUF has no such tensor.
        """
        for key, tensor in state.items():
            if key == "lm_head.weight" and tied:
                continue
            name = self.name(key)
            if name is None or (name == "output.weight" and not self.architecture.own_head):
                raise BaseModelError(f"llama.cpp reads no tensor {key} of a {self.config.model_type} model", HINT)
            value = self.rows(key, tensor.detach())
            yield name, value + self.architecture.norm_shift if key.endswith("norm.weight") else value
        if (factors := rope_factors(self.config)) is not None:
            yield "rope_freqs.weight", factors


def tensor_layout(config: Any) -> TensorLayout:
    """Return the tensors in GGUF of a model.

    Args:
        config: The model's configuration.

    Raises:
        BaseModelError: Its architecture, or a setting of it, is not supported here.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BaseModelError(f"cannot write a {kind} model as GGUF, expected one of {known}", HINT)
    found = ARCHITECTURES[kind]
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation is not None and activation not in found.activations:
        raise BaseModelError(
            f"llama.cpp computes {found.activations[0]} in a {kind} model, this one has {activation}", HINT
        )
    if kind == "gemma2" and config.query_pre_attn_scalar not in _gemma2_scales(config):
        raise BaseModelError(f"llama.cpp has no model with query_pre_attn_scalar={config.query_pre_attn_scalar}", HINT)
    if rope(config)["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        raise BaseModelError(f"cannot write rope_type={rope(config)['rope_type']!r} as GGUF", HINT)
    return TensorLayout(config, found)


def _gemma2_scales(config: Any) -> tuple[float, ...]:
    """Return the values of ``query_pre_attn_scalar`` that llama.cpp assumes of a model of this size."""
    largest = config.num_hidden_layers == 46  # the model of 27 billion parameters
    return (config.hidden_size / config.num_attention_heads if largest else head_size(config),)


def rope(config: Any) -> dict[str, Any]:
    """Return the settings of the rotary position embedding."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", "rope_theta": getattr(config, "rope_theta", 10000.0), **found}


def rope_factors(config: Any) -> Tensor | None:
    """Compute the divisors of the rotary frequencies of Llama 3.1 and later, [head_dim / 2]; None for other models."""
    settings = rope(config)
    if settings["rope_type"] != "llama3":
        return None
    factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = settings["original_max_position_embeddings"]
    positions = torch.arange(0, head_size(config), 2, dtype=torch.float64) / head_size(config)
    turns = length * settings["rope_theta"] ** -positions / (2 * math.pi)  # within the trained window
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_model_keys(writer: Any, config: Any) -> None:
    """Add the keys that describe a model's sizes and functions.

    Args:
        writer: The ``gguf.GGUFWriter``.
        config: The model's configuration, of a supported architecture.
    """
    settings = rope(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if settings["rope_type"] in ("linear", "yarn"):
        kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
        writer.add_rope_scaling_type(kinds[settings["rope_type"]])
        writer.add_rope_scaling_factor(settings["factor"])
        if original := settings.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
