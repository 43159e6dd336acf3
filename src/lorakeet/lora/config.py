"""``LoraConfig``: the settings of an adapter, as its ``adapter_config.json`` holds them.

The method's own settings (name, default, check, help) are written once, in :class:`lorakeet.config.LoraSettings`. The other
keys of the file are added here. PEFT's keys that Lorakeet does not implement are kept while they are neutral; values that
would change the adapter's output are refused. A variant of LoRA (:mod:`lorakeet.lora.variants`) brings its own keys.
"""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from lorakeet.config import LoraSettings
from lorakeet.errors import AdapterError, ConfigError, did_you_mean
from lorakeet.files import write_json
from lorakeet.log import warn
from lorakeet.lora.initialization.settings import own_settings, written
from lorakeet.lora.interop.peft_classes import AnswersAsPeft
from lorakeet.lora.interop.peft_methods import as_lora, as_method
from lorakeet.lora.interop.trainer_hooks import hook_trainer
from lorakeet.lora.interop.wrappers import canonical_settings
from lorakeet.lora.lifecycle.adapter_files import CONFIG_NAME as CONFIG_NAME
from lorakeet.lora.lifecycle.adapter_files import DOWNLOAD_ARGUMENTS as DOWNLOAD_ARGUMENTS
from lorakeet.lora.lifecycle.adapter_files import FILE_ARGUMENTS, find_adapter_file
from lorakeet.lora.peft_names.other_settings import NEUTRAL, is_neutral, without_runtime
from lorakeet.lora.peft_names.words import LORA_BIAS
from lorakeet.lora.variants import Variant, chosen_variant, setting_value, variant_settings
from lorakeet.security.json_file import JsonError, read_object
from lorakeet.security.paths import is_file, is_hub_id
from lorakeet.setting_types import settings_error

#: Bytes of the largest ``adapter_config.json``; some name each of thousands of layers.
LARGEST_FILE = 1 << 22
#: Release of PEFT whose file format is read and written.
PEFT_FORMAT = "0.21.2"


#: PEFT's keys with the settings of single initializations -> the values that mean "not used".
INITIALIZATION: dict[str, Any] = {"eva_config": None, "loftq_config": {}}
#: Settings of methods that are no LoRA in PEFT; its files of LoRA do not have them.
OF_METHODS = ("adalora_config", "vera_config")


class PeftType(enum.StrEnum):
    """The method of an adapter, by PEFT's name; LoRA is the only one here."""

    LORA = "LORA"


class TaskType(enum.StrEnum):
    """The task of a model, by PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftConfig(AnswersAsPeft, LoraSettings):
    """Settings of one adapter and the other keys of its file; ``PeftConfig.from_pretrained`` reads any.

    Raises:
        ConfigError: a key is unknown (with the nearest name), of the wrong type or out of range. Or it is a key of PEFT's
            that Lorakeet does not implement, with a value that would change the result.
    """

    model_config = ConfigDict(frozen=False, extra="forbid")
    peft_class: ClassVar[tuple[str, str]] = ("peft", "PeftConfig")

    words_are_names: ClassVar[bool] = False

    task_type: TaskType | None = Field(None, description="what the model is for")
    peft_type: PeftType = Field(PeftType.LORA, description="the method; always LORA")
    auto_mapping: dict[str, Any] | None = Field(None, description="class of a base that has no task type")
    base_model_name_or_path: str | None = Field(None, description="public name of the base model")
    revision: str | None = Field(None, description="revision of the base model on the hub")
    inference_mode: bool = Field(False, description="True in a saved adapter: its weights are frozen when loaded")
    peft_version: str | None = Field(None, description="release of PEFT that wrote the file")

    _foreign: dict[str, Any] = PrivateAttr(default_factory=dict)
    _made: dict[str, Any] | None = PrivateAttr(None)

    def __init__(self, **values: Any) -> None:
        hook_trainer()
        values = without_runtime(values)
        unknown = set(values) - set(type(self).model_fields) - _foreign_keys()
        if unknown:
            raise ConfigError(
                f"unknown argument of LoraConfig {', '.join(map(repr, sorted(unknown)))}",
                did_you_mean(min(unknown), type(self).model_fields),
            )
        self._check_and_set(values)

    def _check_and_set(self, values: dict[str, Any]) -> None:
        values = canonical_settings(values)
        own = {key: value for key, value in values.items() if key in type(self).model_fields}
        foreign = {key: setting_value(key, value) for key, value in values.items() if key not in own}
        try:
            super().__init__(**own)
        except ValidationError as error:
            raise settings_error(error, type(self)) from None
        self._foreign = {**foreign, **own_settings(self.init_lora_weights, foreign)}
        supported = {*self.variant.settings, *INITIALIZATION}
        unsupported = {k: v for k, v in foreign.items() if k not in supported and not is_neutral(k, v)}
        if unsupported:
            listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unsupported.items()))
            raise ConfigError(
                f"this adapter uses {listed}, which this version of Lorakeet does not implement and which would change "
                "the result",
                "train it without, or use a newer version",
            )
        self._check_target_parameters()
        self._check_initialization()

    def _check_target_parameters(self) -> None:
        """Refuse settings that act on a layer's input or output: as in PEFT, a bare parameter has neither."""
        names = ("lora_dropout", "lora_bias", "fan_in_fan_out")
        if self.target_parameters and (given := [f"{key}={getattr(self, key)}" for key in names if getattr(self, key)]):
            raise ConfigError(
                f"target_parameters={self.target_parameters} cannot be adapted with {', '.join(given)}",
                "leave it out, or train two adapters",
            )

    def _check_initialization(self) -> None:
        """Refuse a trained bias beside an initialization by name, as PEFT does: each sets A and B alone."""
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            raise ConfigError(LORA_BIAS.format(how=self.init_lora_weights), "leave one of them out")
        if self.init_lora_weights == "mica" and self.variant.settings:
            raise ConfigError(
                f"init_lora_weights='mica' is for plain LoRA, and the settings choose {self.variant.name}",
                "leave one of them out",
            )

    # -- what was made of it ----------------------------------------------------------------------------------------

    def keep(self, resolved: PeftConfig) -> None:
        """Take the values of the settings with which an adapter was made, and remember them.

        As in PEFT, a model keeps the very object that it was given, with the names that were found filled in.
        """
        for name in type(self).model_fields:
            setattr(self, name, getattr(resolved, name))
        made = LoraSettings.model_fields.keys() - {"init_lora_weights"}  # which changes no layer that is there
        self._made = {name: getattr(self, name) for name in made}

    def as_made(self) -> PeftConfig:
        """Return a copy with the settings that the adapter was made with, for its file.

        A program may change the object for its next model; the adapter that was made before stays as it is.
        """
        made = self._made or {}
        if changed := [name for name, value in made.items() if getattr(self, name) != value]:
            warn(
                f"{', '.join(changed)} changed after the adapter was made: the file gets the values that it was made with"
            )
        return self.model_copy(update=made)

    # -- PEFT's attributes ------------------------------------------------------------------------------------------

    #: Whether the method trains a prompt, or layers of its own beside the base's; LoRA does neither.
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __getattr__(self, name: str) -> Any:
        # the keys of PEFT's that have no field here
        if name in _foreign_keys():
            return self._foreign.get(name, {**NEUTRAL, **INITIALIZATION, **variant_settings()}[name])
        return super().__getattr__(name)  # type: ignore[misc]

    # -- the variant ------------------------------------------------------------------------------------------------

    @property
    def variant(self) -> Variant:
        """The variant of LoRA that the settings choose."""
        return chosen_variant({**self._foreign, **{name: getattr(self, name) for name in type(self).model_fields}})

    @property
    def variant_settings(self) -> dict[str, Any]:
        """The values of the chosen variant's own settings."""
        return {key: getattr(self, key) for key in self.variant.settings}

    def named_base(self, adapter: str | Path) -> str | None:
        """Return the base that the file names: a hub id, never a path, which a stranger may have written.

        Raises:
            AdapterError: It names a path. ``adapter`` is what the user called the adapter.
        """
        name = self.base_model_name_or_path
        if name and not is_hub_id(name):
            raise AdapterError(
                f"adapter {str(adapter)!r} names its base by a path, {name!r}, and paths in an adapter are not followed",
                f"give the base yourself: --model {name}, or allow_local_base=True of an auto class",
            )
        return name

    def scaling(self, r: int, alpha: float) -> float:
        """Return s in h = W₀x + s·B·A·x for an adapter of rank r."""
        return self.variant.scaling(self, r, alpha)

    # -- the file ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return every key of an ``adapter_config.json``, including PEFT's that Lorakeet does not implement."""
        values = self.model_dump(mode="json")
        values["lora_alpha"] = _integral(values["lora_alpha"])  # some readers parse an unsigned integer
        values["alpha_pattern"] = {key: _integral(value) for key, value in values["alpha_pattern"].items()}
        values["peft_version"] = values["peft_version"] or PEFT_FORMAT
        unset = {**NEUTRAL, **INITIALIZATION, **variant_settings()}
        every = {**unset, **written(self._foreign), **values}
        return dict(sorted((key, value) for key, value in every.items() if value is not None or key not in OF_METHODS))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraConfig:
        """Build the settings from the keys of a file; unknown keys of a newer PEFT are kept if neutral, else refused.

        Raises:
            ConfigError: as the constructor, or ``peft_type`` is another method.
        """
        config = LoraConfig.__new__(LoraConfig)
        config._check_and_set(as_lora(values))
        return config

    @classmethod
    def from_peft_type(cls, **values: Any) -> LoraConfig:
        """Build the settings from values with a ``peft_type``, PEFT's name for :meth:`from_dict`."""
        return cls.from_dict(values)

    @staticmethod
    def from_json_file(path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """Return the content of an ``adapter_config.json`` as a dictionary."""
        return read_object(Path(path_json_file), LARGEST_FILE)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``adapter_config.json`` into the folder."""
        write_json(Path(save_directory) / CONFIG_NAME, as_method(self.to_dict()))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> LoraConfig:
        """Read ``adapter_config.json`` from a folder or a hub id.

        Args:
            pretrained_model_name_or_path: Folder or hub id of the adapter.
            kwargs: :data:`FILE_ARGUMENTS`, and values to override.

        Raises:
            AdapterError: there is no such file, or it is not a JSON object.
            ConfigError: see :meth:`from_dict`.
        """
        where = {key: kwargs.pop(key) for key in FILE_ARGUMENTS if key in kwargs}
        path = find_adapter_file(pretrained_model_name_or_path, CONFIG_NAME, **where)
        if path is None:
            folder = Path(pretrained_model_name_or_path)
            if is_file(folder / "config.json"):
                raise AdapterError(f"{folder} is a model, expected an adapter", f"use it without one: --model {folder}")
            raise AdapterError(
                f"{pretrained_model_name_or_path} has no {CONFIG_NAME}",
                "give the folder that save_pretrained wrote, or the adapter's hub id",
            )
        try:
            values = read_object(path, LARGEST_FILE)
        except (JsonError, OSError) as error:
            raise AdapterError(f"{path} is not JSON: {error}", "download or save the adapter again") from None
        return cls.from_dict({**values, **{key: kwargs[key] for key in kwargs if key in cls.model_fields}})


class LoraConfig(PeftConfig):
    """Settings of one LoRA adapter, with the names and defaults of ``peft.LoraConfig``."""

    peft_class = ("peft", "LoraConfig")


def _dataclass_fields(config: type[PeftConfig]) -> dict[str, Any]:
    """Return the settings as fields of a dataclass, so that ``dataclasses.replace``, ``asdict`` and ``fields`` work."""
    names = dict.fromkeys([*config.model_fields, *NEUTRAL, *INITIALIZATION, *variant_settings()])
    made: Any = dataclasses.make_dataclass(config.__name__, [(name, Any, None) for name in names])
    return made.__dataclass_fields__


for _config in (PeftConfig, LoraConfig):
    _config.__dataclass_fields__ = _dataclass_fields(_config)  # type: ignore[attr-defined, union-attr]


def refuse_unknown(method: str, given: dict[str, Any], harmless: set[str]) -> None:
    """Accept PEFT's arguments that have no effect here, and None, which asks for nothing.

    Raises:
        TypeError: Any other argument, as in any function.
    """
    if unknown := sorted({name for name, value in given.items() if value is not None} - harmless):
        raise TypeError(f"{method}() got an unexpected keyword argument {unknown[0]!r}")


def _foreign_keys() -> set[str]:
    """Return the keys of an adapter's file that have no field here."""
    return {*NEUTRAL, *INITIALIZATION, *variant_settings()}


def _integral(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
