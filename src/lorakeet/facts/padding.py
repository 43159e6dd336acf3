"""Padding token of a base, on which config, generation config and tokenizer agree from its loading on."""

from __future__ import annotations

from typing import Any

from lorakeet.facts.text_config import text_config
from lorakeet.facts.vocabulary import vocabulary_size


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


def agree_on_special_tokens(tokenizer: Any, config: Any, generation_config: Any = None) -> None:
    """Write the padding token of :func:`padding_token` into the tokenizer and the configurations.

    A tokenizer without an end token gets the config's: it ends every sample, and stops generation.

    Args:
        tokenizer: Of ``transformers``.
        config: Of the model.
        generation_config: Of the model, if it has one; a padding token that it does not state is not added.
    """
    _state_end(tokenizer, config)
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


def _state_end(tokenizer: Any, config: Any) -> None:
    """Write the config's end token into a tokenizer that states none."""
    stated = getattr(text_config(config), "eos_token_id", None)
    first = next(iter(stated), None) if isinstance(stated, list) else stated
    if tokenizer.eos_token_id is None and _is_special(tokenizer, first):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)


def _is_special(tokenizer: Any, token: Any) -> bool:
    """Whether the id is a special token of the tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return token in tokenizer.all_special_ids or (token in added and added[token].special)
