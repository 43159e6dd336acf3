"""Vocabulary of a base: the rows of its embedding, and tokens that have none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorakeet.errors import DataError
from lorakeet.facts.text_config import text_config
from lorakeet.quant.protocol import weight_shape

#: Hint for token ids that the model cannot read.
NO_ROW_HINT = (
    "leave the token out of the texts, or give the base a row for it: model.resize_token_embeddings(len(tokenizer)), "
    "then save both"
)


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
