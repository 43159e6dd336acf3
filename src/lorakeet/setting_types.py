"""Building blocks of the settings in :mod:`lorakeet.config`: bounded value types, selections, and the class of a section."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from lorakeet.errors import ConfigError, did_you_mean
from lorakeet.security.shown import cut, holds_secret

# -- numbers ----------------------------------------------------------------------------------------------------------

#: Largest count, such as steps or rows, and largest factor; it catches typing errors such as ``1e21``.
LARGEST = 10**9


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def _distinct(tokens: list[int]) -> list[int]:
    if len(set(tokens)) < len(tokens):
        raise PydanticCustomError("distinct", "Input should be a list without repeated tokens")
    return tokens


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool)]
Count = Annotated[Int, Field(gt=0, le=LARGEST)]
#: An index, or a count that may be 0.
Index = Annotated[Int, Field(ge=0, le=LARGEST)]
#: A seed; NumPy takes 32 bits.
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
Positive = Annotated[Float, Field(gt=0, le=LARGEST)]
#: A learning rate; the bound catches typing errors, not rates at which a training diverges.
Rate = Annotated[Float, Field(gt=0, le=1000)]
PositiveNumber = Annotated[int | float, BeforeValidator(_refuse_bool), Field(gt=0, le=LARGEST)]  # an int stays an int
NonNegative = Annotated[Float, Field(ge=0, le=LARGEST)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
#: A share of which something is left.
Share = Annotated[Float, Field(gt=0, le=1)]
#: Distinct token ids.
TokenIds = Annotated[list[Index], Field(min_length=1), AfterValidator(_distinct)]

# -- text -------------------------------------------------------------------------------------------------------------


def text_error(text: str) -> str | None:
    """Return what was expected in place of a text that is empty, or that no file in UTF-8 can hold; None if it is fine."""
    if not text.strip():
        return "text that is not empty"
    if "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text):
        return "text in UTF-8 without a null character"
    return None


def _filled(text: str) -> str:
    wish = text_error(text) or (
        "text without a token or password: set HF_TOKEN instead" if holds_secret(text) else None
    )
    if wish:
        raise PydanticCustomError("text", "Input should be {wish}", {"wish": wish})
    return text


#: Text; bytes, which YAML has too, are none.
String = Annotated[str, Field(strict=True)]
Text = Annotated[String, AfterValidator(_filled)]

# -- selections -------------------------------------------------------------------------------------------------------

#: Selection of every linear layer but the head.
ALL_LINEAR = "all-linear"
#: Characters of which a regular expression has one at least, and a list of names none.
_REGEX_SIGNS = frozenset(r"\*+?[](){}|^$")
#: Form in which rank_pattern and alpha_pattern are compared with the name of a layer, as in PEFT.
NAME_ENDS_WITH = r"(.*\.)?({})$"
#: Form in which layers_pattern is compared with the name of a layer; the last group is the number.
NUMBERED_LIST = r"(?:^|.*?\.){}\.(\d+)\."


def as_names(value: Any, words_are_names: bool) -> Any:
    """Return a selection in the form of the settings: sets and comma-separated names as a list, all else as it is.

    Args:
        value: As the user gave it.
        words_are_names: Whether a single word is a list of one name, else a regular expression.
    """
    if isinstance(value, (set, frozenset, tuple)):
        return list(value) if isinstance(value, tuple) else sorted(value, key=str)
    names = isinstance(value, str) and value.lower() != ALL_LINEAR and not _REGEX_SIGNS.intersection(value)
    if names and ("," in value or (words_are_names and value.strip())):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


def regex_error(pattern: str, *forms: str) -> str | None:
    """Return why a text is no regular expression, also as a part of each of the ``forms``; None if it is one."""
    for form in ("{}", *forms):
        try:
            re.compile(form.replace("{}", pattern))
        except (re.error, OverflowError, RecursionError) as error:
            return str(error)
    return None


def _regex(*forms: str) -> AfterValidator:
    def check(pattern: str) -> str:
        if error := regex_error(_filled(pattern), *forms):
            wish = "Input should be a regular expression or a list of names ({error})"
            raise PydanticCustomError("regex", wish, {"error": error})
        return pattern

    return AfterValidator(check)


#: Layers or modules by name or last parts of the name; a single text is a regular expression for the whole name.
Selection = list[Text] | Annotated[String, _regex()]
#: The end of a layer's name, or a regular expression for it.
NamePattern = Annotated[String, _regex(NAME_ENDS_WITH)]
#: Name of a numbered list of layers, or a regular expression for it.
LayersPattern = Annotated[String, _regex(NUMBERED_LIST)]


# -- sections ---------------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """A frozen group of settings; unknown keys and infinite numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, allow_inf_nan=False)


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


def setting_names(section: type[BaseModel]) -> list[str]:
    """Return the dotted names of all settings below ``section``."""
    return [name for name, _ in settings_below(section)]


def settings_below(section: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the pydantic field of each setting below ``section``."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from ((f"{name}.{sub}", below) for sub, below in settings_below(inner))
        else:
            yield name, field


# -- errors -----------------------------------------------------------------------------------------------------------

#: Parts of a pydantic location that name a branch of a union, not a setting.
_UNION_BRANCHES = ("str", "int", "bool", "float", "constrained-int", "constrained-float")
#: Characters of a wrong value that a message shows.
_SHOWN = 80


def settings_error(error: ValidationError, section: type[BaseModel]) -> ConfigError:
    """Return all problems that pydantic found as one error.

    The hint is about the first: the most similar known name of an unknown key, or what the setting is.
    """
    expected: dict[str, list[str]] = {}  # problem -> expectation of each branch of a union
    hints: list[str | None] = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"] if "[" not in str(part) and part not in _UNION_BRANCHES)
        if item["type"] in ("extra_forbidden", "invalid_key"):
            expected[f"unknown setting {_shown(name)}"] = []
            known = f"known here: {', '.join(section.model_fields)}"
            hints.append(did_you_mean(name, setting_names(section)) or known)
        elif item["type"] == "contradiction":
            expected[item["msg"]] = []
            hints.append(item["ctx"]["hint"])
        else:
            wish = item["msg"].removeprefix("Input should be ")
            wish = "a section with settings of its own" if item["type"] == "model_type" else wish
            problem = f"{cut(name, _SHOWN)} = {_shown(item['input'])}"
            expected.setdefault(problem, []).append(wish[0].lower() + wish[1:])
            hints.append(_description(name, section))
    problems = [
        problem + (f": expected {', or '.join(dict.fromkeys(wishes))}" if wishes else "")
        for problem, wishes in expected.items()
    ]
    return ConfigError("; ".join(problems), next(filter(None, hints), None))


def settings_object(key: str, kind: type[Any], value: Any) -> Any:
    """Return a setting that has fields as an object of its class, each field of the type that it states.

    Args:
        key: Name of the setting, for messages.
        kind: Its class, a dataclass.
        value: An object of the class, a mapping, or any object with these attributes, as one of PEFT's class.

    Raises:
        ConfigError: It has no fields, or one is unknown, of another type or out of range.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    if fields is None:
        raise ConfigError(f"{key}={_shown(value)} is no {kind.__name__}", f"its fields: {', '.join(known)}")
    if unknown := sorted(map(str, fields.keys() - set(known))):
        raise ConfigError(f"unknown entry {_shown(unknown[0])} of {key}", did_you_mean(unknown[0], known))
    types = get_type_hints(kind)
    checked = {}
    for name, given in fields.items():
        try:
            checked[name] = TypeAdapter(types[name]).validate_python(given)
        except ValidationError as error:
            raise ConfigError(
                f"{key}.{name}={_shown(given)} is not valid: {error.errors()[0]['msg']}",
                "leave it out for its default",
            ) from None
    return kind(**checked)


def contradiction(message: str, hint: str) -> PydanticCustomError:
    """Return the error for settings of which each is valid, but not beside the others."""
    return PydanticCustomError("contradiction", "{message}", {"message": message, "hint": hint})


def _description(name: str, section: type[BaseModel]) -> str | None:
    """Return a hint with the description of a setting; of an entry of a list or table, that of the setting it is in."""
    for known, field in (*settings_below(section), *section.model_fields.items()):
        if name == known or name.startswith(f"{known}."):
            return f"{known} is: {field.description}" if field.description else None
    return None


def _shown(value: Any) -> str:
    return cut(repr(value), _SHOWN)
