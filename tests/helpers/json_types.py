"""Forty types with their JSON schemas; pydantic, which makes the schemas, also judges whether a text is of the type."""

from __future__ import annotations

import datetime
import enum
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

Short = Annotated[str, Field(max_length=12)]
Small = Annotated[int, Field(ge=0, le=99)]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Point(Closed):
    x: Small
    y: Small


class Named(Closed):
    name: Short
    point: Point


class Line(Closed):
    points: Annotated[list[Point], Field(min_length=2, max_length=3)]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Painted(Closed):
    colour: Colour
    layers: Annotated[int, Field(ge=1, le=3)]


class Optionals(Closed):
    first: Short | None = None
    second: Small | None = None


class Cat(Closed):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=1, le=9)]


class Dog(Closed):
    kind: Literal["dog"]
    name: Short


class Leaf(Closed):
    value: Small


class Tree(Closed):
    value: Small
    child: Leaf | None


@with_config(ConfigDict(extra="forbid"))
class Typed(TypedDict):
    a: Literal[1, 2]
    b: bool


class Quoted(Closed):
    text: Annotated[str, Field(min_length=1, max_length=20)]
    author: Short | None


class Date(Closed):
    year: Annotated[int, Field(ge=1900, le=2100)]
    month: Annotated[int, Field(ge=1, le=12)]


#: Types, by a name for people.
TYPES: dict[str, Any] = {
    "bool": bool,
    "null": None,
    "digit": Annotated[int, Field(ge=0, le=9)],
    "negative": Annotated[int, Field(ge=-50, le=-10)],
    "across zero": Annotated[int, Field(ge=-3, le=1000)],
    "more than": Annotated[int, Field(gt=5, lt=8)],
    "even": Annotated[int, Field(ge=0, le=50, multiple_of=2)],
    "share": Annotated[float, Field(ge=0, le=1)],
    "degrees": Annotated[float, Field(gt=-273.15, lt=100)],
    "short": Short,
    "exact length": Annotated[str, Field(min_length=3, max_length=3)],
    "word": Annotated[str, Field(pattern=r"^[a-z]{1,8}$")],
    "plate": Annotated[str, Field(pattern=r"^[A-Z]{2}-[0-9]{3}$")],
    "one of two": Annotated[str, Field(pattern=r"^(yes|no)$")],
    "literal": Literal["red", "green"],
    "literals of kinds": Literal[1, "two", None],
    "enum": Colour,
    "date": datetime.date,
    "uuid": uuid.UUID,
    "list of bools": Annotated[list[bool], Field(min_length=1, max_length=4)],
    "list of words": Annotated[list[Literal["a", "b"]], Field(max_length=3)],
    "matrix": Annotated[
        list[Annotated[list[Small], Field(min_length=2, max_length=2)]], Field(min_length=2, max_length=2)
    ],
    "pair": tuple[Small, bool],
    "triple": tuple[Literal["a"], Short, Small],
    "number or word": Small | Literal["none"],
    "optional": Short | None,
    "point": Point,
    "nested": Named,
    "line": Line,
    "painted": Painted,
    "optionals": Optionals,
    "cat or dog": Cat | Dog,
    "discriminated": Annotated[Cat | Dog, Field(discriminator="kind")],
    "animals": Annotated[list[Cat | Dog], Field(min_length=1, max_length=2)],
    "tree": Tree,
    "typed dict": Typed,
    "quotation": Quoted,
    "month": Date,
    "months": Annotated[list[Date], Field(min_length=1, max_length=2)],
    "point or list": Point | Annotated[list[Small], Field(max_length=2)],
}


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON schema of a type."""
    return TypeAdapter(TYPES[name]).json_schema()


def check_text(name: str, text: str) -> None:
    """Check that a text is JSON of a type.

    Raises:
        ValidationError: It is not.
    """
    TypeAdapter(TYPES[name]).validate_json(text)
