"""Settings of AdaLoRA."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from lorakeet.setting_types import Count, Float, Index, NonNegative, Section, contradiction, settings_error

#: Hint for a schedule that does not fit the training.
SCHEDULE_HINT = "lower tinit or tfinal, leave total_step out, or train for more steps"
#: Decay of a moving average.
Decay = Annotated[Float, Field(gt=0, lt=1)]


class AdaLoraConfig(Section):
    """The ranks of layers under AdaLoRA (arXiv:2303.10512); names and defaults are PEFT's.

    Raises:
        ConfigError: A name is unknown, a value out of range, or no step is left in which ranks can fall.
    """

    target_r: Count = Field(8, description="mean rank of a layer at the end")
    init_r: Count = Field(12, description="rank of each layer at the start; lora.r is set to it")
    tinit: Index = Field(0, description="first steps, in which all ranks stay")
    tfinal: Index = Field(0, description="last steps, in which the ranks stay as they were chosen")
    deltaT: Count = Field(1, description="steps between two choices of the ranks")
    beta1: Decay = Field(0.85, description="decay of the moving average of the sensitivity")
    beta2: Decay = Field(0.85, description="decay of the moving average of its uncertainty")
    orth_reg_weight: NonNegative = Field(0.5, description="factor of the penalty on factors that are not orthonormal")
    total_step: Count | None = Field(None, description="steps of the training; default: those of the run")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise settings_error(error, type(self)) from None

    @model_validator(mode="after")
    def _ranks_can_fall(self) -> Self:
        if self.target_r > self.init_r:
            raise contradiction(
                f"target_r={self.target_r} is above init_r={self.init_r}, expected at most as many",
                "the authors begin with 1.5 times the target",
            )
        if self.total_step is not None and (error := self.schedule_error(self.total_step)):
            raise contradiction(error, SCHEDULE_HINT)
        return self

    def schedule_error(self, steps: int) -> str | None:
        """Return why the ranks cannot fall to the target in a training of ``steps`` steps; None if they can."""
        if (self.total_step or 0) > steps:
            return f"adalora_config.total_step={self.total_step} is above the {steps} steps of the training"
        if self.tinit < steps - self.tfinal:
            return None
        return (
            f"tinit={self.tinit} and tfinal={self.tfinal} leave none of {steps} steps for the choice of ranks, "
            "expected at least 1"
        )
