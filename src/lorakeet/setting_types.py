"""Building blocks of the settings in :mod:`lorakeet.config`: bounded value types, and the class of a section."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


def _distinct(tokens: list[int]) -> list[int]:
    if len(set(tokens)) < len(tokens):
        raise PydanticCustomError("distinct", "Input should be a list without repeated tokens")
    return tokens


def _named(path: str) -> str:
    if not path.strip():
        raise PydanticCustomError("path", "Input should be the name of a folder")
    return path


#: A count, such as steps or rows; the upper bound catches typing errors such as ``1e21``.
Count = Annotated[int, Field(gt=0, le=10**9)]
#: A seed; NumPy takes 32 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveNumber = Annotated[int | float, Field(gt=0)]  # an int stays an int in files
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
#: Distinct token ids.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_distinct)]
FolderName = Annotated[str, AfterValidator(_named)]


def plain_types(annotation: Any) -> set[type]:
    """Return the classes that a union of an annotation accepts; of a generic type its origin, such as ``list``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in parts}
    if origin is Annotated:
        return plain_types(parts[0])
    if origin in (Union, UnionType):
        return {inner for part in parts for inner in plain_types(part)}
    return {origin or annotation}


class Section(BaseModel):
    """A frozen group of settings; unknown keys, infinite numbers, and true or false for a number are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name:
            types = plain_types(cls.model_fields[info.field_name].annotation)
            if bool not in types and types & {int, float}:
                raise PydanticCustomError("number", "Input should be a number")
        return value
