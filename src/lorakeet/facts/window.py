"""Window of a base: the most tokens of a text that it and its tokenizer take."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lorakeet.facts.text_config import text_config

#: Tokens from which on a tokenizer's own limit means that it has none; transformers writes 10^30, others 2^31 - 1.
_NO_LIMIT = 10**8


def window(config: Any) -> int | None:
    """Return the most tokens of a text that the model has positions for; None: any number.

    Positions of RoBERTa and its relatives begin behind the padding token. A sliding window of attention is no limit, and
    neither are relative positions.
    """
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", getattr(text, "max_encoder_position_embeddings", None))
    is_relative = bool(getattr(text, "alibi", False)) or getattr(text, "position_biased_input", True) is False
    if not isinstance(positions, int) or positions < 1 or is_relative:
        return None
    return positions - _first_position(text, positions)


def longest_text(config: Any, tokenizer: Any) -> int | None:
    """Return the most tokens of a text that both model and tokenizer take; None: any number."""
    limit = getattr(tokenizer, "model_max_length", None)
    stated = int(limit) if limit is not None and 0 < limit < _NO_LIMIT else None
    return min((one for one in (window(config), stated) if one is not None), default=None)


def _first_position(config: Any, positions: int) -> int:
    """Return the position of the first token: 0, or that behind the padding of a table of positions that has padding."""
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "model_type", None) not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return 0
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(copy.deepcopy(config))
    except Exception:  # an architecture of remote code, or one that cannot be built: its loading says why
        return 0
    for name, module in model.named_modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if "position" in name and padding is not None and table is not None and len(table) == positions:
            return int(padding) + 1
    return 0
