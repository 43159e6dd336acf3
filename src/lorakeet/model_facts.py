"""Facts about a base model that its config, tokenizer and weights may state differently: one function for each.

Every other module asks here. A test holds that none reads these fields by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lorakeet.errors import DataError
from lorakeet.quant.protocol import weight_shape

#: Tokens from which on a tokenizer's own limit means that it has none; transformers writes 10^30, others 2^31 - 1.
_NO_LIMIT = 10**8

#: Hint for token ids that the model cannot read.
NO_ROW_HINT = (
    "leave the token out of the texts, or give the base a row for it: model.resize_token_embeddings(len(tokenizer)), "
    "then save both"
)


def text_config(config: Any) -> Any:
    """Return the configuration of a model's language part: its own, unless it reads images or sound too."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# -- padding ----------------------------------------------------------------------------------------------------------


def padding_token(config: Any, tokenizer: Any = None) -> int | None:
    """Return the id of the padding token; None: there is none.

    It is the config's, since classifiers and encoders look for that one in their input. If the model has no row for it, or
    it is an ordinary word, it is the tokenizer's. If that has none, it is the end token.

    Args:
        config: Of the model; None: unknown.
        tokenizer: Of ``transformers``; None: the config alone is asked.
    """
    stated = getattr(config, "pad_token_id", None)
    stated = getattr(text_config(config), "pad_token_id", None) if stated is None else stated
    rows = vocabulary_size(config)
    candidates = [stated if tokenizer is None or _is_special(tokenizer, stated) else None]
    candidates += [getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    fitting = (one for one in candidates if isinstance(one, int) and one >= 0 and (rows is None or one < rows))
    return next(fitting, None)


def agree_on_padding(tokenizer: Any, config: Any, generation_config: Any = None) -> None:
    """Write the padding token of :func:`padding_token` into the tokenizer and the configurations.

    Args:
        tokenizer: Of ``transformers``.
        config: Of the model.
        generation_config: Of the model, if it has one; a padding token that it does not state is not added.
    """
    chosen, own = padding_token(config, tokenizer), tokenizer.pad_token_id
    if chosen is None:
        return
    if own != chosen:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    for one in (config, text_config(config)):
        if getattr(one, "pad_token_id", None) != chosen:
            one.pad_token_id = chosen
    if getattr(generation_config, "pad_token_id", None) not in (None, chosen):
        generation_config.pad_token_id = chosen


def _is_special(tokenizer: Any, token: Any) -> bool:
    """Whether the id is a special token of the tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return token in tokenizer.all_special_ids or (token in added and added[token].special)


# -- window -----------------------------------------------------------------------------------------------------------


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


# -- rows of the embedding --------------------------------------------------------------------------------------------


def vocabulary_size(config: Any) -> int | None:
    """Return the rows of the embedding that a configuration, or the contents of a config.json, states."""
    if isinstance(config, Mapping):
        size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    else:
        size = getattr(text_config(config), "vocab_size", None)
    return size if isinstance(size, int) else None


def embedding_rows(model: Any) -> int | None:
    """Return the rows of a model's input embedding, as it is in memory; None: it has none."""
    try:
        layer = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    while (inner := getattr(layer, "base_layer", getattr(layer, "original_module", None))) is not None:
        layer = inner  # an adapted embedding
    return None if getattr(layer, "weight", None) is None else weight_shape(layer)[0]


def tokens_without_row(tokenizer: Any, rows: int | None) -> dict[int, str]:
    """Return the tokens of a tokenizer beyond the rows of an embedding, by id."""
    if rows is None or max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder, -1) < rows:
        return {}
    return {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}


def check_token_ids(ids: Iterable[int], tokenizer: Any, rows: int | None, what: str) -> None:
    """Refuse token ids that the model cannot read.

    Args:
        ids: Of a text.
        tokenizer: That made them.
        rows: See :func:`embedding_rows`; None: unknown.
        what: Name of the text.

    Raises:
        DataError: The embedding has no row for one.
    """
    highest = max(ids, default=-1)
    if rows is not None and highest >= rows:
        raise DataError(f"{what} has {no_row(highest, tokenizer, rows)}", NO_ROW_HINT)


def no_row(token: int, tokenizer: Any, rows: int) -> str:
    """Name a token that is beyond the rows of an embedding."""
    name = tokenizer.convert_ids_to_tokens(token)
    return f"the token {name!r} (id {token}), but the base's embedding has {rows:,} rows"


# -- number formats ---------------------------------------------------------------------------------------------------


def stated_dtype(config: Any) -> torch.dtype | None:
    """Return the number format in which a config says the weights are stored; None: it does not say."""
    stated = getattr(config, "dtype", None)
    stated = getattr(text_config(config), "dtype", None) if stated is None else stated
    return getattr(torch, stated, None) if isinstance(stated, str) else stated
