"""Fields that several bodies have: bounded numbers, texts, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

#: Characters of the longest name of a model or adapter.
LONGEST_NAME = 256
#: Stop texts of a request, and characters of one.
MOST_STOPS, LONGEST_STOP = 16, 256
#: Tokens of a request with a bias.
MOST_BIASES = 1024
#: Tokens of the longest answer that a body may ask for; the model's window is the true limit.
MOST_TOKENS = 1 << 20
#: Answers to one prompt.
MOST_CHOICES = 16
#: Likely tokens that are listed beside the chosen one.
MOST_LOGPROBS = 20
#: Seconds that a request may take at most.
LONGEST_TIMEOUT = 3600.0
#: Bits of a seed.
_SEED_BITS = 63


class Body(BaseModel):
    """A JSON object that has only known fields, of exactly the type that they have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def wrong(message: str) -> PydanticCustomError:
    """Return the error of a value; the message follows the name of its field."""
    return PydanticCustomError("value", "{message}", {"message": message})  # type: ignore[arg-type]


def _refuse(value: Any) -> None:
    if value is not None:
        raise wrong("this field is not honoured by this server; leave it out")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _token_biases(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    wild = [str(key)[:20] for key in value if not (str(key).isascii() and str(key).isdigit() and len(str(key)) < 10)]
    if wild:
        raise wrong(f"expected the id of a token, not {wild[0]!r}")
    return {int(key): bias for key, bias in value.items()}


#: A field of OpenAI's that this server does not honour; null is as good as leaving it out.
Refused = Annotated[None, BeforeValidator(_refuse)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(_listed),
]
Biases = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES), BeforeValidator(_token_biases)
]
TokenCount = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class SamplingBody(Body):
    """Fields of chats and completions alike."""

    model: Name
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << _SEED_BITS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stops | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Field(gt=0, le=LONGEST_TIMEOUT)] | None = None
    user: Refused = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options are set, but stream is not true")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether the last event of the stream has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_values(self) -> dict[str, Any]:
        """Return the settings of the sampling that were set, by their names in the engine."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logit_bias")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**values, "stop": tuple(self.stop or ())}

    def seed_of(self, choice: int) -> int | None:
        """Return the seed of an answer: each of several has its own."""
        return None if self.seed is None else (self.seed + choice) % (1 << _SEED_BITS)


def is_text(value: Any) -> bool:
    """Whether a value is text that is not empty."""
    return isinstance(value, str) and value != ""


def filled(value: str) -> str:
    """Return a text; refuse an empty one."""
    if not value:
        raise wrong("expected text that is not empty")
    return value


FilledText = Annotated[str, AfterValidator(filled)]
