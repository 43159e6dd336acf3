"""Checks of a model folder before anything expensive begins: its config, tokenizer and safetensors files.

Only safetensors are read. Pickles are refused by name, since opening one can run code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakeet.base.config_checks import config_problems, weight_facts
from lorakeet.errors import BaseModelError
from lorakeet.files import PICKLE_SUFFIXES
from lorakeet.security.json_file import read_json, read_object
from lorakeet.security.paths import exists, file_problem, is_file, is_plain_name
from lorakeet.security.paths import folder_problems as path_problems

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)


#: Patterns of the files in a model's folder that are opened, here or by transformers.
OPENED = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.safetensors", "*.py"),
    "additional_chat_templates/*",
)


def check_folder(folder: Path, name: str | None = None, *, trust_remote_code: bool = False) -> None:
    """Check that ``folder`` can be loaded as a model.

    Args:
        folder: The folder.
        name: What the user called it.
        trust_remote_code: Whether its files may name code.

    Raises:
        BaseModelError: Files are missing, truncated or refused; the message lists all of them.
    """
    config = check_config(folder, name)
    problems = folder_problems(folder)
    if problems or (problems := config_problems(config, weight_facts(weight_files(folder)), trust_remote_code)):
        raise BaseModelError(
            f"{name or folder} cannot be loaded: {'; '.join(problems)}",
            "download its files again, or save the model with save_pretrained(), which writes safetensors",
        )


def check_config(folder: Path, name: str | None = None) -> dict[str, Any]:
    """Check by its config alone that ``folder`` is a model and no adapter; return the config.

    Raises:
        BaseModelError: It is an adapter, or has no config.json, or one that names no architecture or asks for too much.
    """
    if problem := file_problem(folder, "config.json"):
        raise BaseModelError(f"{name or folder} is refused: {problem}", "copy the file itself into the folder")
    if exists(folder / "adapter_config.json"):
        raise adapter_not_model(name or str(folder), folder / "adapter_config.json")
    if not exists(folder / "config.json") and exists(folder / "adapter" / "adapter_config.json"):
        raise adapter_not_model(str(folder / "adapter"), folder / "adapter" / "adapter_config.json")
    if not exists(folder / "config.json"):
        files = sorted(folder.glob("*.gguf"))
        hint = f"give the GGUF file: {files[0]}" if files else "give the folder that save_pretrained() wrote"
        raise BaseModelError(f"{name or folder} is no model: there is no config.json in {folder}", hint)
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{folder / 'config.json'} is not readable as JSON: {error}", "download it again"
        ) from error
    if not isinstance(config, dict) or not ("model_type" in config or "auto_map" in config):
        raise BaseModelError(
            f"{folder / 'config.json'} has no model_type, so the architecture is unknown",
            "give a folder that save_pretrained() wrote",
        )
    if problems := config_problems(config, trust=True):  # whether its code is trusted is asked when it is loaded
        raise BaseModelError(f"{name or folder} is refused: {'; '.join(problems)}", "check its config.json")
    return config


def folder_problems(folder: Path) -> list[str]:
    """List all missing, truncated or refused files of the weights and the tokenizer in ``folder``."""
    problems = path_problems(folder, OPENED) or _weight_problems(folder)
    if not any(exists(folder / name) for name in TOKENIZER_FILES):
        problems.append("no tokenizer (such as tokenizer.json)")
    return problems


def adapter_not_model(path: str, adapter_config: Path) -> BaseModelError:
    """Return the error for an adapter where a model is expected; the hint names the adapter's base."""
    try:
        base = read_object(adapter_config).get("base_model_name_or_path")
    except (OSError, ValueError):
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
    if not exists(folder / INDEX):
        return [folder / WEIGHTS]
    try:
        names = {*read_object(folder / INDEX)["weight_map"].values()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{INDEX} is not readable") from error
    if strange := [name for name in names if not is_plain_name(name) or Path(name).suffix != ".safetensors"]:
        raise ValueError(f"{INDEX} names {str(strange[0])[:80]!r}, expected safetensors files in its own folder")
    return [folder / name for name in sorted(names)]


def weight_reader(path: Path, model: Any) -> Callable[[str], Tensor]:
    """Return a function that reads the weight of a layer from the files of a base, by the layer's name in the model.

    Args:
        path: Folder of the base in full precision, or its only safetensors file.
        model: The base; its prefix may be missing in the files.

    Raises:
        BaseModelError: The files cannot be read; or, by the function, they have no such weight in full precision.
    """
    try:
        files = [path] if is_file(path) else weight_files(path)
        places = {key: file for file in files for key in _keys(file)}
    except (ValueError, OSError, SafetensorError) as error:
        raise BaseModelError(
            f"{path} has no weights that can be read ({error})", "give the folder of the base"
        ) from None
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def read(layer: str) -> Tensor:
        name = f"{layer}.weight"
        key = next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in places), None)
        if key is None:
            raise BaseModelError(f"{path} has no weight {name}", "give the folder of the base in full precision")
        with safe_open(places[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise BaseModelError(f"{path} has {name} quantized", "give the folder of the base in full precision")
        return tensor

    return read


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _weight_problems(folder: Path) -> list[str]:
    try:
        files = [file.name for file in weight_files(folder)]
    except ValueError as error:
        return [str(error)]
    missing = [name for name in files if not exists(folder / name)]
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
