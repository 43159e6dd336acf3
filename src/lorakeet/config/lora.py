"""Settings of LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lorakeet.config.adalora import AdaLoraConfig
from lorakeet.config.vera import VeraConfig
from lorakeet.errors import ConfigError
from lorakeet.setting_types import (
    ALL_LINEAR,
    Count,
    Fraction,
    Index,
    LayersPattern,
    NamePattern,
    PositiveNumber,
    Section,
    Selection,
    Text,
    TokenIds,
    as_names,
    contradiction,
)

#: Initializations by name; of ``pissa_niter_N``, N is the number of subspace iterations of a fast SVD.
INITIALIZATIONS = ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq", "eva", "mica")


def _initialization(name: bool | str) -> bool | str:
    """Return the name in lower case, or true and false as they are.

    Raises:
        PydanticCustomError: There is no such initialization.
    """
    if isinstance(name, bool) or name.lower() in ("true", "false"):
        return name if isinstance(name, bool) else name.lower() == "true"
    name = name.lower()
    kind = re.sub(r"_niter_\d{1,3}$", "_niter_N", name, flags=re.ASCII)
    if kind not in INITIALIZATIONS or name == "pissa_niter_n":
        wish = "Input should be true, false, or one of {known}"
        raise PydanticCustomError("initialization", wish, {"known": ", ".join(INITIALIZATIONS)})
    return name


def _settings_of(name: str, kind: type[Section]) -> BeforeValidator:
    """Return what makes the settings of a variant an object: of a mapping, or of true, its defaults."""

    def make(value: Any) -> Any:
        if value is not True and not isinstance(value, Mapping):
            return value
        try:
            return kind(**({} if value is True else {str(key): one for key, one in value.items()}))
        except ConfigError as error:
            raise contradiction(f"{name}: {error.message}", error.hint or "") from None

    return BeforeValidator(make)


class LoraSettings(Section):
    """The settings of LoRA, with the names and defaults of the field (Hu et al. 2021, arXiv:2106.09685)."""

    r: Count = Field(8, description="rank of the update B·A")
    lora_alpha: PositiveNumber = Field(8, description="the update is scaled by lora_alpha / r")
    lora_dropout: Fraction = Field(0.0, description="dropout probability of the inputs of A, in training")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases to train: none, all, lora_only (those of adapted layers)"
    )
    target_modules: Selection | None = Field(
        None,
        description="layers to adapt: names or suffixes, one regular expression, or 'all-linear'; default: by architecture",
    )
    exclude_modules: Selection | None = Field(
        None, description="layers never to adapt: names, suffixes or one regular expression"
    )
    modules_to_save: list[Text] | None = Field(None, description="modules to train in full and save with the adapter")
    layers_to_transform: list[Index] | Index | None = Field(
        None, description="numbers of the layers to adapt; default: all"
    )
    layers_pattern: list[LayersPattern] | LayersPattern | None = Field(
        None, description="name of the module list that layers_to_transform indexes"
    )
    rank_pattern: dict[NamePattern, Count] = Field(
        default_factory=dict, description="ranks of single layers, by name or regular expression"
    )
    alpha_pattern: dict[NamePattern, PositiveNumber] = Field(
        default_factory=dict, description="alphas of single layers, by name or regular expression"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) (arXiv:2312.03732)")
    use_dora: bool = Field(
        False,
        description="train the magnitude of each output channel apart from its direction (DoRA, arXiv:2402.09353)",
    )
    adalora_config: Annotated[AdaLoraConfig | None, _settings_of("adalora_config", AdaLoraConfig)] = Field(
        None,
        description="let the ranks of layers fall to those that they need (AdaLoRA, arXiv:2303.10512): target_r, init_r, "
        "tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight, total_step",
    )
    vera_config: Annotated[VeraConfig | None, _settings_of("vera_config", VeraConfig)] = Field(
        None,
        description="train two vectors in each layer, between random matrices that all share (VeRA, arXiv:2310.11454): "
        "projection_prng_key, save_projection, d_initial",
    )
    fan_in_fan_out: bool = Field(False, description="weights are stored as [in, out] (detected for GPT-2's Conv1D)")
    init_lora_weights: Annotated[bool | str, AfterValidator(_initialization)] = Field(
        True,
        description="true: A Kaiming-uniform, B zero; or gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq, eva, "
        "mica; false: both random (for tests)",
    )
    lora_bias: bool = Field(False, description="add a bias to B")
    target_parameters: list[Text] | None = Field(
        None,
        description="parameters to adapt that belong to no linear layer, such as stacked expert weights: names or suffixes",
    )
    trainable_token_indices: TokenIds | dict[Text, TokenIds] | None = Field(
        None,
        description="token ids whose embedding rows (and rows of a tied head) to train and save; or such lists by layer name",
    )
    ensure_weight_tying: bool = Field(
        False, description="apply the adaptation or training of an embedding to all layers that share its weight"
    )

    #: Whether a single word is a list with that name, as it is in a flag; else, as in PEFT, it is a regular expression.
    words_are_names: ClassVar[bool] = True

    @field_validator(
        "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters", mode="before"
    )
    @classmethod
    def _names_are_a_list(cls, value: Any) -> Any:
        return as_names(value, cls.words_are_names)

    @model_validator(mode="after")
    def _adalora_sets_the_rank(self) -> Self:
        if self.adalora_config is not None and self.r != (r := self.adalora_config.init_r):
            if self.r != type(self).model_fields["r"].default:
                raise contradiction(
                    f"r={self.r} is set beside adalora_config.init_r={r}, the rank that AdaLoRA begins with",
                    f"leave r out, or set it to {r} too",
                )
            object.__setattr__(self, "r", r)
        return self

    @model_validator(mode="after")
    def _layers_are_chosen_once(self) -> Self:
        numbers, pattern, targets = self.layers_to_transform, self.layers_pattern, self.target_modules
        chosen = [] if numbers in (None, []) else ["layers_to_transform"]
        chosen += ["layers_pattern"] if pattern else []
        if chosen and isinstance(targets, str) and targets.lower() != ALL_LINEAR:
            raise contradiction(
                f"`{chosen[0]}` cannot be used when `target_modules` is a str: {targets!r} is one regular expression",
                "give target_modules as a list of names, or write the numbers of the layers into the expression",
            )
        if chosen == ["layers_pattern"]:
            raise contradiction(
                "layers_pattern is set without layers_to_transform, which gives the numbers of the layers in that list",
                "give the numbers, for example layers_to_transform=[0, 1], or leave layers_pattern out",
            )
        return self
