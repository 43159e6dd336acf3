"""Checks of a model folder before anything expensive begins: its config, tokenizer and safetensors files.

Only safetensors are read. Pickles are refused by name, since opening one can run code.
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
    """Check that ``folder`` can be loaded as a model; ``name`` is what the user called it.

    Raises:
        BaseModelError: Files are missing, truncated or refused; the message lists all of them.
    """
    check_config(folder, name)
    if problems := folder_problems(folder):
        raise BaseModelError(
            f"{name or folder} cannot be loaded: {'; '.join(problems)}",
            "download its files again, or save the model with save_pretrained(), which writes safetensors",
        )


def check_config(folder: Path, name: str | None = None) -> None:
    """Check by its config alone that ``folder`` is a model and no adapter.

    Raises:
        BaseModelError: It is an adapter, or has no config.json, or one that names no architecture.
    """
    if (folder / "adapter_config.json").exists():
        raise adapter_not_model(name or str(folder), folder / "adapter_config.json")
    if not (folder / "config.json").exists() and (folder / "adapter" / "adapter_config.json").exists():
        raise adapter_not_model(str(folder / "adapter"), folder / "adapter" / "adapter_config.json")
    if not (folder / "config.json").exists():
        files = sorted(folder.glob("*.gguf"))
        hint = f"give the GGUF file: {files[0]}" if files else "give the folder that save_pretrained() wrote"
        raise BaseModelError(f"{name or folder} is no model: there is no config.json in {folder}", hint)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{folder / 'config.json'} is not readable as JSON: {error}", "download it again"
        ) from error
    if not isinstance(config, dict) or not ("model_type" in config or "auto_map" in config):
        raise BaseModelError(
            f"{folder / 'config.json'} has no model_type, so the architecture is unknown",
            "give a folder that save_pretrained() wrote",
        )


def folder_problems(folder: Path) -> list[str]:
    """List all missing, truncated or refused files of the weights and the tokenizer in ``folder``."""
    problems = _weight_problems(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        problems.append("no tokenizer (such as tokenizer.json)")
    return problems


def adapter_not_model(path: str, adapter_config: Path) -> BaseModelError:
    """Return the error for an adapter where a model is expected; the hint names the adapter's base."""
    try:
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return BaseModelError(
        f"{path} is an adapter (it has an adapter_config.json), expected a model",
        f"use --adapter {path}, or --init-adapter {path} to train it further"
        + (f", with --model {base}" if base else ", and give its base with --model"),
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of the model in ``folder``: one, or those that its index names.

    Raises:
        ValueError: The index is not readable.
    """
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted({str(name) for name in index["weight_map"].values()})]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} is not readable") from error


def _weight_problems(folder: Path) -> list[str]:
    try:
        files = [file.name for file in weight_files(folder)]
    except ValueError:
        return [f"{INDEX} is not readable"]
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        refused = f"; refused: {', '.join(pickles)}, since opening a pickle can run code" if pickles else ""
        return [f"no {', '.join(missing)} (only safetensors are read{refused})"]
    return [problem for name in files if (problem := _unreadable(folder / name))]


def _unreadable(file: Path) -> str | None:
    """Describe the damage of a safetensors file, or return None; opening it checks its header against its length."""
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"{file.name} is truncated, or no safetensors file ({error})"
