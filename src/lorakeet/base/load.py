"""A base model is loaded frozen, its number format and device chosen once, verified and said.

What `transformers` would only warn about is an error here: weights that are missing (and would be random), weights of
another shape, tensors in another number format than was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorakeet.base.architectures import WHOLE
from lorakeet.base.checkpoint_files import check_folder
from lorakeet.base.device_dtype import bytes_by_dtype, check_dtypes, choose_device, choose_dtype, dtype_name, some
from lorakeet.base.quiet import quiet
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import BaseSettings, complaints
from lorakeet.errors import BaseModelError
from lorakeet.kernels.int8.registry import best_on
from lorakeet.log import warn
from lorakeet.quant.hf_quantizer import METHOD, Int8Config, foreign_method, foreign_method_error
from lorakeet.quant.protocol import quantized_layers, weight_shape


@dataclass(frozen=True)
class Base:
    """A frozen base model and its tokenizer. ``model, tokenizer = load_base()`` works as well.

    Attributes:
        model: in eval mode, no parameter requires a gradient.
        tokenizer: has a pad token (the end token, where it had none; padding is masked by position).
        name: the public name, where it is known; what an adapter records.
        dtype: of the weights.
        device: of the weights.
        fresh: weights that the files lack: a new head, which begins at random and has to be trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    dtype: torch.dtype
    device: torch.device
    fresh: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer

    def describe(self) -> str:
        """One line: name, parameters, number format, device, bytes by number format."""
        sizes = bytes_by_dtype(self.model)
        parts = ", ".join(f"{dtype_name(dtype)} {_size(count)}" for dtype, count in sizes.items())
        count = sum(parameter.numel() for parameter in self.model.parameters())
        rounded = sum(1 for _ in quantized_layers(self.model))
        how = f", {rounded} layers in 8 bits ({best_on(self.device).name} products)" if rounded else ""
        return (
            f"{self.name}: {count:,} parameters, {dtype_name(self.dtype)} on {self.device}, "
            f"{_size(sum(sizes.values()))} ({parts}){how}"
        )


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a base model before its weights are read."""

    name: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def inspect_model(settings: BaseSettings) -> ModelInfo:
    """Name, configuration and tokenizer of a base model whose files are all there.

    Raises:
        BaseModelError: as :func:`load_base`, as far as it can be told without the weights.
    """
    source = find_source(settings.model, settings.revision)
    folder = local_folder(source, settings.trust_remote_code)
    check_folder(folder, source.name)
    remote = {"trust_remote_code": settings.trust_remote_code}
    tokenizer = load_tokenizer(folder, source.name, remote)
    return ModelInfo(source.name, _config(folder, source.name, remote), tokenizer)


def load_base(
    settings: BaseSettings | str | None = None,
    *,
    auto_class: Any = AutoModelForCausalLM,
    for_training: bool = False,
    model_options: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Base:
    """Load a base model, frozen.

    Args:
        settings: the settings, or only the model's reference; left out: the embedded default.
        auto_class: the `transformers` auto class of the task. Heads that it adds and the files lack are new and random:
            that is said, and an error for a causal language model.
        for_training: refuse at once what cannot train.
        model_options: further arguments of ``from_pretrained``, such as ``num_labels``.
        **overrides: single settings by name, e.g. ``dtype="bf16"``; ``load_in_8bit=True`` means ``bits=8``.

    Raises:
        BaseModelError: the model, device or number format is not there, contradictory, damaged or incomplete.
        ConfigError: an unknown or mistyped setting.
    """
    chosen = _settings(settings, overrides)
    device = choose_device(chosen.device)
    dtype = choose_dtype(chosen, device, for_training)
    source = find_source(chosen.model, chosen.revision)
    folder = local_folder(source, chosen.trust_remote_code)
    check_folder(folder, source.name)
    remote = {"trust_remote_code": chosen.trust_remote_code}
    tokenizer = load_tokenizer(folder, source.name, remote)
    options = {"dtype": dtype, **remote, **_rounding(folder, chosen.bits, source.name, remote), **(model_options or {})}
    model, fresh = _load_model(folder, source.name, auto_class, device, options)
    check_dtypes(model, dtype, source.name)
    _check_vocabulary(model, tokenizer, source.name)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    # Adapters, model cards and checkpoints record this name: never the cache's folder.
    model.name_or_path = model.config._name_or_path = source.name
    model.requires_grad_(False).eval()
    return Base(model, tokenizer, source.name, dtype, device, fresh)


def _config(folder: Path, name: str, remote: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, **remote)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"the configuration of {name} cannot be read: {_reason(error)}") from error


def _rounding(folder: Path, bits: int | None, name: str, remote: Mapping[str, Any]) -> dict[str, Any]:
    """What tells ``from_pretrained`` to round to 8 bits while it reads; nothing for files that are rounded already.

    Raises:
        BaseModelError: the files are quantised, and not as ``bits`` says.
    """
    method = getattr(_config(folder, name, remote), "quantization_config", None)
    if bits == 8 and (other := foreign_method(method)):
        raise foreign_method_error(name, other)
    if bits in (16, 32) and method is not None and not foreign_method(method):
        raise BaseModelError(
            f"{name} is written in 8 bits ({METHOD}), bits={bits} was asked for",
            "leave out --bits, or give the full-precision model",
        )
    return {"quantization_config": Int8Config()} if bits == 8 and method is None else {}


def _settings(settings: BaseSettings | str | None, overrides: Mapping[str, Any]) -> BaseSettings:
    overrides = dict(overrides)
    if overrides.pop("load_in_8bit", False):
        overrides["bits"] = 8
    values = {"model": settings} if isinstance(settings, str) else settings.model_dump() if settings else {}
    try:
        return BaseSettings.model_validate({**values, **overrides})
    except ValidationError as error:
        raise complaints(error, BaseSettings) from None


def load_tokenizer(folder: Path, name: str, remote: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, with a pad token; ``name`` is what the model is called.

    Raises:
        BaseModelError: its files are damaged.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
    except Exception as error:  # damaged vocabularies break the readers in many ways
        raise BaseModelError(f"the tokenizer of {name} cannot be read: {_reason(error)}") from error
    for mark in ("is_local", "local_files_only"):  # where it was opened from is nothing to save with it
        tokenizer.init_kwargs.pop(mark, None)
    tokenizer.name_or_path = name
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(
    folder: Path, name: str, auto_class: Any, device: torch.device, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the weights of it that are new and random."""
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed in info, and refused below
                **{**place, **options},
            )
    except BaseModelError as error:
        raise BaseModelError(f"{name} cannot be loaded: {error.message}", error.hint) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise BaseModelError(f"{name} cannot be loaded: {_reason(error)}") from error
    whole = auto_class in WHOLE
    own = {key for key, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    info = {**info, "missing_keys": [key for key in info["missing_keys"] if key in own]}  # a fresh layer has no scales
    return model, _check_weights(info, name, whole, "" if whole else f"{model.base_model_prefix}.")


def _check_weights(info: Mapping[str, Any], name: str, must_be_whole: bool, prefix: str) -> tuple[str, ...]:
    """What transformers found amiss: other shapes are errors, as are missing weights unless a new head is expected.

    A head (what lies outside ``prefix``) of another shape, say for other classes, is replaced by a new one.
    """
    odd = {key: (list(found), list(wanted)) for key, found, wanted in info["mismatched_keys"]}
    replaced = [key for key in odd if prefix and not key.startswith(prefix)]
    missing, unexpected = sorted([*info["missing_keys"], *replaced]), sorted(info["unexpected_keys"])
    problems = [
        f"{key} is {found}, its config says {wanted}" for key, (found, wanted) in odd.items() if key not in replaced
    ]
    if missing and must_be_whole:
        problems.append(f"{len(missing)} weights are missing and would be random: {some(missing)}")
    if problems:
        raise BaseModelError(f"the weights of {name} do not fit: {some(sorted(problems))}", "get its files again")
    if missing:
        warn(f"{len(missing)} weights are not in {name} and begin at random: {some(missing)}")
    if unexpected:
        warn(f"{len(unexpected)} weights of {name} are not used: {some(unexpected)}")
    return tuple(missing)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Say which tokens the model has no embedding for: a text with one of them would break a run in the middle."""
    rows = weight_shape(model.get_input_embeddings())[0]
    beyond = [token for token, number in tokenizer.get_added_vocab().items() if number >= rows]
    if beyond:
        warn(f"{name} has embeddings for {rows} tokens, its tokenizer knows more: no text may hold {some(beyond)}")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _reason(error: Exception) -> str:
    """The first line of an error, with its kind where the line alone says little."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
