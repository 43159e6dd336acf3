"""A GGUF file, converted once into a cache: safetensors, config and tokenizer, which open in seconds.

The file's format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. ``transformers`` knows the
architectures and dequantises; the conversion is fp32, so nothing is rounded: four bytes a parameter on disk.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
import transformers
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lorakeet.base.checkpoint_files import folder_problems
from lorakeet.base.quiet import quiet
from lorakeet.errors import BaseModelError, LorakeetError, OutputError
from lorakeet.files import cache_home, write_folder
from lorakeet.log import info

#: Roles of a tokenizer's special tokens, and what GGUF calls them.
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def converted(path: Path, name: str) -> Path:
    """The folder in ``cache_home()/gguf`` that holds the GGUF file ``path`` as a transformers model.

    The folder is named by ``name`` and the file's content (SHA-256), so another file never meets a stale conversion.
    It is written whole or not at all; processes that come at the same time wait for the first.

    Raises:
        BaseModelError: the file is truncated, or no GGUF file of a language model that transformers can read.
        OutputError: the cache cannot be written to.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    label = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2])
    folder = cache_home() / "gguf" / f"{label}-{digest}"
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
            if not _whole(folder):
                _convert_aside(path, folder)
    except LorakeetError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {folder}: {error}", "set LORAKEET_HOME to a folder with room that you may write to"
        ) from error
    return folder


def _convert_aside(path: Path, folder: Path) -> None:
    info(f"converting {path.name} to safetensors, once; this takes ten seconds or more")
    begin = time.perf_counter()
    with write_folder(folder) as aside:
        _convert(path, aside)
    info(f"converted in {time.perf_counter() - begin:.0f} s, kept in {folder}")


def _whole(folder: Path) -> bool:
    return folder.is_dir() and not folder_problems(folder)


def _convert(path: Path, folder: Path) -> None:
    """Write the GGUF file ``path`` into ``folder`` by save_pretrained."""
    import gguf

    header = read_header(path)
    options: dict[str, Any] = {"gguf_file": "model.gguf"}
    weights: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # else blocks may stay packed, and the model marked as quantised
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Read once: transformers parses the file for config and weights anew, and names all tensors for each module.
    # Alone in a folder, since a tokenizer.json beside the file would be taken instead; the reader's bars go to stderr.
    once = _remembering(gguf, "GGUFReader", "get_tensor_name_map")
    with quiet(), redirect_stderr(io.StringIO()), once, tempfile.TemporaryDirectory() as alone:
        Path(alone, "model.gguf").symlink_to(path.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, **options)
            model, info = AutoModelForCausalLM.from_pretrained(alone, **options, **weights)
        except Exception as error:  # a damaged file breaks the readers in many ways
            raise BaseModelError(
                f"{path} cannot be converted: {type(error).__name__}: {' '.join(str(error).split())}",
                "the file may be truncated: get it again; or its architecture has no GGUF reader in transformers",
            ) from error
        if info["missing_keys"]:
            raise BaseModelError(f"{path} lacks the weights {', '.join(sorted(info['missing_keys']))}")
        _as_the_file_says(tokenizer, header)
        vars(model.config).pop("_model_name_or_path", None)  # general.name, misspelt
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _remembering(module: ModuleType, *names: str) -> Iterator[None]:
    """While this holds, functions of a module give for the same arguments what they gave before."""
    own = {name: getattr(module, name) for name in names if hasattr(module, name)}
    try:
        for name, function in own.items():
            setattr(module, name, functools.cache(function))
        yield
    finally:
        for name, function in own.items():
            setattr(module, name, function)


def _as_the_file_says(tokenizer: PreTrainedTokenizerBase, header: Mapping[str, str | int]) -> None:
    """Set the special tokens that the file names by id; some versions of transformers take the start for the end."""
    for role, key in SPECIAL_TOKENS.items():
        number = header.get(f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, role, None if number is None else tokenizer.convert_ids_to_tokens(number))
    tokenizer.clean_up_tokenization_spaces = False  # decode what was encoded, space for space
    if template := header.get("tokenizer.chat_template"):
        tokenizer.chat_template = template


def gguf_name(path: Path) -> str:
    """The model's name as the GGUF file states it (``general.name``), else the file's stem.

    Raises:
        BaseModelError: this is no GGUF file, or it ends within its header.
    """
    return str(read_header(path).get("general.name") or path.stem)


def read_header(path: Path) -> dict[str, str | int]:
    """The texts and unsigned 32-bit numbers among a GGUF file's key-value pairs, in milliseconds.

    Raises:
        BaseModelError: this is no GGUF file, or it ends within its header.
    """
    header: dict[str, str | int] = {}
    try:
        with path.open("rb") as file:
            magic, version, _tensors, pairs = _unpack(file, "<4sIQQ")
            if magic != b"GGUF" or not 2 <= version <= 3:
                raise ValueError(f"it begins with {magic!r}, version {version}")
            for _ in range(pairs):
                key = _value(file, _STRING)
                value = _value(file, *_unpack(file, "<I"))
                if value is not None:
                    header[str(key)] = value
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise BaseModelError(
            f"{path} is truncated or no GGUF file: {error}",
            "a model is a folder, a hub id or a GGUF file of version 2 or 3",
        ) from error
    return header


_UINT32, _STRING, _ARRAY = 4, 8, 9
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the number types


def _value(file: BinaryIO, kind: int) -> str | int | None:
    """Read one value: a text or an unsigned 32-bit number; arrays and other numbers are passed over."""
    if kind == _STRING:
        (length,) = _unpack(file, "<Q")
        if length > 2**24:
            raise ValueError(f"a text of {length} bytes in its header")
        return file.read(length).decode("utf-8", errors="replace")
    if kind == _UINT32:
        return int(_unpack(file, "<I")[0])
    if kind == _ARRAY:
        inner, count = _unpack(file, "<IQ")
        if inner in _BYTES:
            file.seek(_BYTES[inner] * count, 1)
        else:
            for _ in range(count):
                _value(file, inner)
        return None
    file.seek(_BYTES[kind], 1)
    return None


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
