"""Is a folder a whole model? Config, tokenizer and safetensors are looked at before anything expensive begins.

Only safetensors are read: a pickle can run code as it opens, so it is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorakeet.errors import BaseModelError
from lorakeet.files import PICKLE_SUFFIXES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)


def check_folder(folder: Path, name: str | None = None) -> None:
    """See that ``folder`` can be loaded as a model; ``name`` is what the person called it.

    Raises:
        BaseModelError: names everything that is missing, truncated or refused, at once.
    """
    check_config(folder, name)
    if problems := folder_problems(folder):
        raise BaseModelError(
            f"{name or folder} cannot be loaded: {'; '.join(problems)}",
            "get its files again, or save it once with save_pretrained(), which writes safetensors",
        )


def check_config(folder: Path, name: str | None = None) -> None:
    """See that ``folder`` is a model and no adapter, by its config alone.

    Raises:
        BaseModelError: it is an adapter, has no config.json, or one that names no architecture.
    """
    if (folder / "adapter_config.json").exists():
        raise adapter_given(name or str(folder), folder / "adapter_config.json")
    if not (folder / "config.json").exists():
        files = sorted(folder.glob("*.gguf"))
        hint = f"give the file itself: {files[0]}" if files else "give the folder that save_pretrained() wrote"
        raise BaseModelError(f"{name or folder} is no model: config.json was sought in {folder}, not found", hint)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{folder / 'config.json'} is not readable as JSON: {error}") from error
    if not isinstance(config, dict) or not ("model_type" in config or "auto_map" in config):
        raise BaseModelError(f"{folder / 'config.json'} names no model_type, so its architecture is unknown")


def folder_problems(folder: Path) -> list[str]:
    """Everything that is missing, truncated or refused of the weights and the tokenizer in ``folder``."""
    problems = _weight_problems(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        problems.append("no tokenizer (tokenizer.json was sought)")
    return problems


def adapter_given(place: str, adapter_config: Path) -> BaseModelError:
    """The error for an adapter given where a whole model is expected; the hint names the adapter's base."""
    try:
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return BaseModelError(
        f"{place} holds an adapter (adapter_config.json), expected a whole model",
        f"use --adapter {place}" + (f" with --model {base}" if base else " and give its base with --model"),
    )


def _weight_problems(folder: Path) -> list[str]:
    files = [WEIGHTS]
    if (folder / INDEX).exists():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = sorted({str(name) for name in index["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [f"{INDEX} is not readable"]
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        refused = f"; refused: {', '.join(pickles)}, since a pickle can run code as it opens" if pickles else ""
        return [f"no {', '.join(missing)} (only safetensors are read{refused})"]
    return [problem for name in files if (problem := _unreadable(folder / name))]


def _unreadable(file: Path) -> str | None:
    """Why a safetensors file cannot be read, or None. Opening it compares its header with its length."""
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"{file.name} is truncated or no safetensors file ({error})"
