"""Loading of a frozen base model, with its number format and device chosen, verified and logged.

Problems of which `transformers` only warns are errors here: missing weights (which would be random), weights of another
shape, and tensors in another number format than the requested one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
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

from lorakeet.base.architectures import NO_NEW_HEAD
from lorakeet.base.checkpoint_files import check_folder, weight_files
from lorakeet.base.config_checks import check_size, weight_facts
from lorakeet.base.device_dtype import (
    bytes_by_dtype,
    check_dtypes,
    choose_device,
    choose_dtype,
    dtype_name,
    keeps_halves,
    some,
)
from lorakeet.base.quiet import quiet
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import QUANTIZED_FORMATS, BaseSettings
from lorakeet.errors import BaseModelError
from lorakeet.facts.padding import agree_on_special_tokens
from lorakeet.facts.vocabulary import embedding_rows, tokens_without_row
from lorakeet.kernels.int8.registry import best_on
from lorakeet.log import warn
from lorakeet.quant.half_loading import HalfConfig
from lorakeet.quant.hf_quantizer import (
    CONFIGS,
    NF4_METHOD,
    foreign_method,
    foreign_method_error,
    own_bits,
    reads_layout,
)
from lorakeet.quant.protocol import quantized_layers, value_count
from lorakeet.rng import seeded
from lorakeet.setting_types import settings_error


@dataclass(frozen=True)
class Base:
    """A frozen base model and its tokenizer. ``model, tokenizer = load_base()`` works as well.

    Attributes:
        model: The model in eval mode; no parameter requires a gradient.
        tokenizer: The tokenizer, with the padding token of :func:`lorakeet.facts.padding.padding_token`.
        name: The name that an adapter records; the public name, if known.
        dtype: Number format of the floating-point weights.
        device: Device of the weights.
        fresh: Names of weights that the checkpoint lacks: a new, randomly initialized head that must be trained.
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
        """Return one line: name, parameters, number format, device, bytes by number format."""
        sizes = bytes_by_dtype(self.model)
        parts = ", ".join(f"{dtype_name(dtype)} {_size(count)}" for dtype, count in sizes.items())
        count = value_count(self.model)
        counts = Counter(layer.bits for _, layer in quantized_layers(self.model))
        how = "".join(f", {number} layers in {bits} bits" for bits, number in sorted(counts.items()))
        how += f" ({best_on(self.device).name} products)" if 8 in counts else ""
        return (
            f"{self.name}: {count:,} parameters, {dtype_name(self.dtype)} on {self.device}, "
            f"{_size(sum(sizes.values()))} ({parts}){how}"
        )


@dataclass(frozen=True)
class ModelInfo:
    """Name, configuration and tokenizer of a base model, read without its weights."""

    name: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def inspect_model(settings: BaseSettings) -> ModelInfo:
    """Read the configuration and tokenizer of a base model, and check that its files are complete.

    Raises:
        BaseModelError: As in :func:`load_base`, except for errors in the weights.
    """
    source = find_source(settings.model, settings.revision)
    folder = local_folder(source, settings.trust_remote_code)
    check_folder(folder, source.name, **(remote := {"trust_remote_code": settings.trust_remote_code}))
    tokenizer, config = load_tokenizer(folder, source.name, remote), _config(folder, source.name, remote)
    agree_on_special_tokens(tokenizer, config)
    return ModelInfo(source.name, config, tokenizer)


def load_base(
    settings: BaseSettings | str | None = None,
    *,
    auto_class: Any = AutoModelForCausalLM,
    for_training: bool = False,
    model_options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    brought: Collection[str] = (),
    **overrides: Any,
) -> Base:
    """Load a base model, frozen.

    Args:
        settings: The settings, or only the model's reference; by default the embedded model.
        auto_class: The `transformers` auto class of the task. A head that the checkpoint lacks is initialized randomly,
            with a warning; for a language model it is an error.
        for_training: Refuse a number format that cannot be trained in.
        model_options: Further arguments of ``from_pretrained``, such as ``num_labels``.
        seed: Seed of weights that the checkpoint lacks; None: they are drawn from torch's own state.
        brought: Names of weights that an adapter brings: no warning where the checkpoint lacks them.
        **overrides: Single settings by name, e.g. ``dtype="bf16"``; ``load_in_8bit=True`` means ``bits=8``, and
            ``load_in_4bit=True`` ``bits=4``.

    Returns:
        The frozen model with its tokenizer.

    Raises:
        BaseModelError: The model, device or number format is missing, contradictory, damaged or incomplete.
        ConfigError: A setting is unknown or of the wrong type.
    """
    chosen = _settings(settings, overrides)
    device = choose_device(chosen.device)
    dtype = choose_dtype(chosen, device, for_training)
    source = find_source(chosen.model, chosen.revision)
    folder = local_folder(source, chosen.trust_remote_code)
    check_folder(folder, source.name, **(remote := {"trust_remote_code": chosen.trust_remote_code}))
    check_size(
        _config(folder, source.name, remote), weight_facts(weight_files(folder)), source.name, auto_class, **remote
    )
    tokenizer = load_tokenizer(folder, source.name, remote)
    more = _format(folder, chosen, source.name, remote, model_options or {}, keeps_halves(chosen, device, folder))
    options = {"dtype": dtype, **remote, **more}
    with seeded(seed):
        model, fresh = _load_model(folder, source.name, auto_class, device, options, brought)
    check_dtypes(model, dtype, source.name)
    _check_vocabulary(model, tokenizer, source.name)
    agree_on_special_tokens(tokenizer, model.config, model.generation_config if model.can_generate() else None)
    # Adapters, model cards and checkpoints record this name, not the folder of the cache.
    model.name_or_path = model.config._name_or_path = source.name
    model.requires_grad_(False).eval()
    return Base(model, tokenizer, source.name, dtype, device, fresh)


def _config(folder: Path, name: str, remote: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, **remote)
    except Exception as error:  # values of wrong types raise many kinds of errors
        raise BaseModelError(
            f"the configuration of {name} cannot be read: {_reason(error)}", "check its config.json"
        ) from error


def _format(
    folder: Path, settings: BaseSettings, name: str, remote: Mapping[str, Any], more: Mapping[str, Any], halves: bool
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantize during loading, keep 16 bits, or read a quantized checkpoint.

    Args:
        folder: Folder of the checkpoint.
        settings: Settings of the base.
        name: Name of the model, for messages.
        remote: The argument ``trust_remote_code``.
        more: Further arguments, settings of the model.
        halves: Whether weights stay in 16 bits where the files have them so.

    Raises:
        BaseModelError: The checkpoint is quantized in another format than ``bits``.
    """
    config, bits = _config(folder, name, remote), settings.bits
    method = getattr(config, "quantization_config", None)
    quantized = None if bits is None else QUANTIZED_FORMATS.get(bits)
    if halves and method is None:
        return {"quantization_config": HalfConfig(), **more}
    if bits in (4, None) and reads_layout(method):
        config.quantization_config = {"quant_method": NF4_METHOD, "layout": "bitsandbytes"}
        for key, value in more.items():
            setattr(config, key, value)
        return {"config": config}
    if quantized and (other := foreign_method(method)):
        raise foreign_method_error(name, other)
    if bits is not None and (own := own_bits(method)) not in (None, bits):
        raise BaseModelError(
            f"{name} is stored quantized, in {own} bits, and bits={bits} is set",
            "remove --bits, or give the full-precision model",
        )
    return {**({"quantization_config": CONFIGS[quantized]()} if quantized and method is None else {}), **more}


def _settings(settings: BaseSettings | str | None, overrides: Mapping[str, Any]) -> BaseSettings:
    overrides = dict(overrides)
    if overrides.pop("load_in_8bit", False):
        overrides["bits"] = 8
    if overrides.pop("load_in_4bit", False):
        overrides["bits"] = 4
    values = {"model": settings} if isinstance(settings, str) else settings.model_dump() if settings else {}
    try:
        return BaseSettings.model_validate({**values, **overrides})
    except ValidationError as error:
        raise settings_error(error, BaseSettings) from None


def load_tokenizer(folder: Path, name: str, remote: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, as it is.

    Args:
        folder: Folder of the model.
        name: Name of the model, for messages and for the tokenizer's own record.
        remote: The argument ``trust_remote_code``, as a mapping.

    Raises:
        BaseModelError: Its files are damaged.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
    except Exception as error:  # damaged vocabularies raise many kinds of errors
        raise BaseModelError(
            f"the tokenizer of {name} cannot be read: {_reason(error)}", "download its files again"
        ) from error
    for key in ("is_local", "local_files_only"):  # save_pretrained would save them
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.name_or_path = name
    return tokenizer


def _load_model(
    folder: Path, name: str, auto_class: Any, device: torch.device, options: Mapping[str, Any], brought: Collection[str]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model, and the names of its randomly initialized weights."""
    device_map = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed in info, and refused below
                **{**device_map, **options},
            )
    except BaseModelError as error:
        raise BaseModelError(f"{name} cannot be loaded: {error.message}", error.hint) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise BaseModelError(
            f"{name} cannot be loaded: {_reason(error)}", "check its files, or update transformers"
        ) from error
    complete = auto_class in NO_NEW_HEAD
    own = {key for key, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    info = {**info, "missing_keys": [key for key in info["missing_keys"] if key in own]}  # a fresh layer has no scales
    return model, _check_weights(info, name, complete, "" if complete else f"{model.base_model_prefix}.", brought)


def _check_weights(
    info: Mapping[str, Any], name: str, must_be_complete: bool, prefix: str, brought: Collection[str]
) -> tuple[str, ...]:
    """Check the loading info of transformers, and return the names of the randomly initialized weights.

    A head (weights without ``prefix``) of another shape, e.g. for other classes, is replaced by a new one. Any other weight
    of another shape is an error, and so are missing weights if ``must_be_complete``.
    """
    misfits = {key: (list(found), list(expected)) for key, found, expected in info["mismatched_keys"]}
    replaced = [key for key in misfits if prefix and not key.startswith(prefix)]
    missing, unexpected = sorted([*info["missing_keys"], *replaced]), sorted(info["unexpected_keys"])
    problems = [
        f"{key} has shape {found}, expected {expected}"
        for key, (found, expected) in misfits.items()
        if key not in replaced
    ]
    if missing and must_be_complete:
        problems.append(f"{len(missing)} weights are missing and would be random: {some(missing)}")
    if problems:
        raise BaseModelError(
            f"the weights of {name} do not fit its config: {some(sorted(problems))}", "download its files again"
        )
    if random := [key for key in missing if key not in brought]:
        warn(f"{len(random)} weights are not in {name} and are initialized randomly: {some(random)}")
    if unexpected:
        warn(f"{len(unexpected)} weights of {name} are not used: {some(unexpected)}")
    return tuple(missing)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Warn of tokens without an embedding: a text with one of them would end a run with an error."""
    rows = embedding_rows(model)
    if beyond := tokens_without_row(tokenizer, rows):
        warn(
            f"{name} has embeddings of {rows} tokens, its tokenizer has more: no text may contain "
            f"{some([*beyond.values()])}"
        )


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _reason(error: Exception) -> str:
    """Return the class and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
