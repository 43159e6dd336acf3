"""Vocabulary of an adapter: the rows that a base's embedding must have before the adapter fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open

from lorakeet.adapter.serialization import WEIGHTS_NAME
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.errors import AdapterError
from lorakeet.facts.padding import agree_on_special_tokens
from lorakeet.facts.vocabulary import embedding_rows, tokens_without_row
from lorakeet.log import info, warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.lifecycle.adapter_files import adapter_folder, find_adapter_file
from lorakeet.rng import seeded
from lorakeet.security.paths import folder_problems, is_dir

#: Patterns of the files that a tokenizer is read from.
TOKENIZER_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*")
#: Rows by which a vocabulary may more than double, where no file has them.
_MOST_NEW = 4096
#: Last parts of the keys whose tensors have a row for each token.
_WHOLE = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")


def adapter_tokenizer(adapter: str) -> Any:
    """Return the tokenizer saved with an adapter, which may have its own chat template or tokens; None: there is none.

    Raises:
        AdapterError: its files are damaged, or lead out of the adapter's folder.
    """
    if find_adapter_file(adapter, "tokenizer_config.json") is None:
        return None
    from transformers import AutoTokenizer

    folder = adapter_folder(adapter)
    if is_dir(folder) and (problems := folder_problems(folder, TOKENIZER_PATTERNS)):
        raise AdapterError(f"{adapter} is refused: {'; '.join(problems)}", "copy the files themselves into the folder")
    try:
        return AutoTokenizer.from_pretrained(folder if is_dir(folder) else adapter, trust_remote_code=False)
    except Exception as error:  # damaged vocabularies raise many kinds of errors
        reason = (str(error).strip().splitlines() or [""])[0]
        raise AdapterError(
            f"the tokenizer of {adapter} cannot be read: {type(error).__name__}: {reason}",
            "copy the adapter again, or delete its tokenizer files to use the base's",
        ) from error


def fit_to_adapters(model: Any, own_tokenizer: Any, adapters: Sequence[str], *, seed: int | None = None) -> Any:
    """Return the tokenizer of the first adapter, or else the base's own, after the base's vocabulary is made to fit it.

    Args:
        model: The base, without adapters.
        own_tokenizer: The base's.
        adapters: Folders or hub ids.
        seed: Seed of new rows; None: torch's own state.

    Raises:
        AdapterError: The adapters have embeddings of different sizes.
    """
    tokenizer = adapter_tokenizer(adapters[0]) or own_tokenizer
    fit_vocabulary(model, tokenizer, own_tokenizer, adapters, seed=seed)
    agree_on_special_tokens(tokenizer, model.config, getattr(model, "generation_config", None))
    return tokenizer


def fit_vocabulary(
    model: Any, tokenizer: Any, own_tokenizer: Any, adapters: Sequence[str], *, seed: int | None = None
) -> None:
    """Resize the embedding of a base to the rows of its adapters' files, or else to the tokens of their tokenizer.

    Rows that the base lacks come from the adapter; those that it has not saved are drawn at random, with a warning.

    Args:
        model: The base, without adapters.
        tokenizer: The tokenizer that the adapters were trained with.
        own_tokenizer: The base's; tokens that it has without a row stay without one.
        adapters: Folders or hub ids.
        seed: Seed of new rows; None: torch's own state.

    Raises:
        AdapterError: The adapters have embeddings of different sizes.
    """
    rows = embedding_rows(model)
    if rows is None or not hasattr(model, "resize_token_embeddings"):
        return
    saved = {adapter: count for adapter in adapters if (count := saved_rows(model, adapter)) is not None}
    if len(set(saved.values())) > 1:
        listed = ", ".join(f"{adapter}: {count:,}" for adapter, count in saved.items())
        raise AdapterError(f"the adapters have embeddings of different sizes ({listed})", "load one of them at a time")
    trained = {token for adapter in adapters for token in _trained_tokens(adapter)}
    known = tokens_without_row(own_tokenizer, rows)
    beyond = {number: token for number, token in tokens_without_row(tokenizer, rows).items() if number not in known}
    wanted = next(iter(saved.values()), max([rows - 1, *trained, *beyond]) + 1)
    if wanted == rows:
        return
    if not saved and wanted > 2 * rows + _MOST_NEW:
        raise AdapterError(
            f"the adapter trains token {wanted - 1:,}, and the base has {rows:,} tokens",
            "load the base it was trained on",
        )
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    with seeded(seed):
        model.resize_token_embeddings(wanted, mean_resizing=False)
    if frozen:
        model.requires_grad_(False)
    info(f"vocabulary {rows:,} rows of the base, {wanted:,} with those of the adapter")
    if not saved and (fresh := sorted(set(beyond) - trained)):
        some = ", ".join(beyond[token] for token in fresh[:5])
        warn(f"{len(fresh)} added tokens have no row in the adapter, so theirs are random: {some}")


def saved_rows(model: Any, adapter: str) -> int | None:
    """Return the rows of the embedding or head in an adapter's file; None: it has neither.

    Args:
        model: The base, which knows the names of both.
        adapter: Folder or hub id.
    """
    path = find_adapter_file(adapter, WEIGHTS_NAME)
    names = list(_vocabulary_layers(model))
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                for name in names:
                    part = key.removeprefix(f"{PREFIX}{name}.")
                    if part != key and part in (*_WHOLE, "lora_B.weight", "lora_embedding_A"):
                        shape = file.get_slice(key).get_shape()
                        return int(shape[1 if part == "lora_embedding_A" else 0])
    except (SafetensorError, OSError, TypeError, IndexError):
        return None  # a missing or damaged file is reported when the tensors are read
    return None


def _vocabulary_layers(model: Any) -> Iterator[str]:
    """Yield the names of the embedding and of the head that has a row for each token."""
    rows = embedding_rows(model)
    layers = [getattr(model, method)() for method in ("get_input_embeddings", "get_output_embeddings")]
    for name, module in model.named_modules():
        if any(module is layer for layer in layers) and len(getattr(module, "weight", ())) == rows:
            yield name


def _trained_tokens(adapter: str) -> list[int]:
    """Return the tokens whose rows an adapter trains and saves."""
    indices: Any = getattr(PeftConfig.from_pretrained(adapter), "trainable_token_indices", None) or []
    return [token for tokens in (indices.values() if isinstance(indices, dict) else [indices]) for token in tokens]


def weights_brought(adapter: str) -> frozenset[str]:
    """Return the names of the weights that an adapter has whole, such as those of its head."""
    path = find_adapter_file(adapter, WEIGHTS_NAME)
    try:
        with safe_open(path, "pt") as file:
            return frozenset(key.removeprefix(PREFIX) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError, TypeError):
        return frozenset()  # a missing or damaged file is reported when the tensors are read
