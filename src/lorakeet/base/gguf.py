"""Conversion of a GGUF file, once, to a cached folder of safetensors, config and tokenizer, which loads in seconds.

The file format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. ``transformers`` knows the architectures and
dequantizes the weights. They are saved in fp32, so nothing is rounded: four bytes a parameter on disk.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lorakeet.base.checkpoint_files import folder_problems
from lorakeet.base.gguf_header import read_header
from lorakeet.base.quiet import quiet
from lorakeet.errors import BaseModelError, LorakeetError, OutputError
from lorakeet.files import cache_home, write_folder
from lorakeet.kernels.cpu.build import compile_meanwhile
from lorakeet.log import info
from lorakeet.security.paths import is_dir

#: Characters of a model's name in the name of its folder.
_LABEL = 80
#: Role of a tokenizer's special token -> its name in GGUF.
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def converted(path: Path, name: str) -> Path:
    """Return the folder in ``cache_home()/gguf`` with the GGUF file as a transformers model; convert it if needed.

    The folder is named by ``name`` and the SHA-256 of the file, so a changed file is converted again. It is written
    atomically; concurrent processes wait for the first.

    Args:
        path: The GGUF file.
        name: Name of the model.

    Raises:
        BaseModelError: The file is truncated, or no GGUF file of a language model that transformers can read.
        OutputError: The cache is not writable.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    label = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2])[:_LABEL]
    folder = cache_home() / "gguf" / f"{label}-{digest}"
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
            if not _is_complete(folder):
                _convert_aside(path, folder)
    except LorakeetError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {folder}: {error}", "set LORAKEET_HOME to a writable folder with enough space"
        ) from error
    return folder


def _convert_aside(path: Path, folder: Path) -> None:
    info(f"converting {path.name} to safetensors, once; this takes ten seconds or more")
    begin = time.perf_counter()
    compile_meanwhile()
    with write_folder(folder) as aside:
        _convert(path, aside)
    info(f"converted in {time.perf_counter() - begin:.0f} s, cached in {folder}")


def _is_complete(folder: Path) -> bool:
    return is_dir(folder) and not folder_problems(folder)


def _convert(path: Path, folder: Path) -> None:
    """Load the GGUF file ``path`` and save it to ``folder`` with save_pretrained."""
    import gguf

    header = read_header(path)
    options: dict[str, Any] = {"gguf_file": "model.gguf"}
    weights: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # otherwise blocks may stay packed, and the model counts as quantized
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # transformers parses the file anew for config and weights, and names all tensors for each module: both are cached.
    # It prefers a tokenizer.json next to the file, so the file is linked into a folder of its own. Progress bars of the
    # reader go to stderr.
    once = _caching(gguf, GGUFReader=_plain_reader(gguf), get_tensor_name_map=gguf.get_tensor_name_map)
    with quiet(), redirect_stderr(io.StringIO()), once, tempfile.TemporaryDirectory() as alone:
        Path(alone, "model.gguf").symlink_to(path.resolve())
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, **options)
            model, info = AutoModelForCausalLM.from_pretrained(alone, **options, **weights)
        except Exception as error:  # damaged files raise many kinds of errors
            raise BaseModelError(
                f"{path} cannot be converted: {type(error).__name__}: {' '.join(str(error).split())}",
                "download it again if it is truncated; transformers may also lack a GGUF reader for its architecture",
            ) from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise BaseModelError(f"{path} lacks the weights {missing}", "download it again")
        _set_special_tokens(tokenizer, header)
        vars(model.config).pop("_model_name_or_path", None)  # general.name, under a misspelled key
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _plain_reader(gguf: Any) -> Any:
    """Return the package's reader with a plain array of the file: half of its time went into slices of a memory map."""

    class PlainReader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._data = mapped.view(np.ndarray)

    return PlainReader


@contextmanager
def _caching(module: ModuleType, **functions: Callable[..., Any]) -> Iterator[None]:
    """Replace functions of a module by these within the block, with their results cached by argument."""
    own = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, functools.cache(function))
        yield
    finally:
        for name, function in own.items():
            setattr(module, name, function)


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, header: Mapping[str, str | int]) -> None:
    """Set the special tokens and the chat template from the file's header.

    Some versions of transformers confuse the start token and the end token.
    """
    for role, key in SPECIAL_TOKENS.items():
        number = header.get(f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, role, None if number is None else tokenizer.convert_ids_to_tokens(number))
    tokenizer.clean_up_tokenization_spaces = False  # keep every space when decoding
    if template := header.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
